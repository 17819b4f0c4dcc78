"""The step at which a run was best, by the loss on validation rows: `--eval-every` and `--keep-best`."""

import json

from engine.checkpoint import save_tensors
from model import open_tensors


class Best:
    """Looks at the loss on validation rows every `every` steps of a run, and with `keep` leaves the adapter where it
    was lowest in best.safetensors. A run that goes on from an earlier checkpoint makes the same file again."""

    def __init__(self, folder, adapter, look, log, every, keep, done):
        self.folder, self.adapter, self.look, self.log, self.every, self.keep = folder, adapter, look, log, every, keep
        self.loss = float("inf")
        if done and self.file.exists():
            with open_tensors(self.file) as file:
                self.loss = json.loads(file.metadata()["loss"])

    @property
    def file(self):
        return self.folder.path / "best.safetensors"

    def __call__(self, step, steps):
        if not self.every or (step % self.every and step != steps):
            return
        loss = self.look()
        self.log({"step": step, "steps": steps, "validation_loss": loss})
        if self.keep and loss < self.loss:
            self.loss = loss
            save_tensors(self.file, self.adapter.tensors(), {"loss": json.dumps(loss)})

    def restore(self):
        if self.keep:
            with open_tensors(self.file) as file:
                self.adapter.load_tensors({name: file.get_tensor(name) for name in file.keys()})
            print(f"kept: the step with the lowest loss on validation rows, {self.loss:.4f}")
