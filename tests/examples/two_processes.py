"""Run an example's loop in two processes; the main one prints what was reduced in each step, and checks the weights.

torchrun --nproc_per_node=2 two_processes.py timm_task vit
"""

import importlib
import json
import sys
from pathlib import Path

import timm
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from digits import DIGITS, small_vit

import augsub

LOOP, MODEL, *OPTIONS = sys.argv[1:]
STEPS = 3
reduced: list[int] = []  # gradients of each step

wrap = DistributedDataParallel.__init__


def wrap_and_count(self: DistributedDataParallel, *args, **kwargs) -> None:
    wrap(self, *args, **kwargs)
    self.register_comm_hook(None, count)


def count(state: None, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    reduced[-1] += bucket.buffer().numel()
    return allreduce_hook(state, bucket)


class CountingObjective(augsub.SubModelObjective):
    def branches(self, *args):
        reduced.append(0)
        return super().branches(*args)


DistributedDataParallel.__init__ = wrap_and_count
if LOOP == "timm_task":  # as timm's script does; the other trainers do it themselves
    distributed.init_process_group("gloo")
torch.manual_seed(0)
images, labels = DIGITS.train[: 2 * 50 * STEPS]
if MODEL == "resnet":  # whose BatchNorm has buffers that DDP copies from the main process
    images = F.interpolate(images, size=64)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
else:
    model = small_vit()
augsub.patch(model)
masking = [augsub.SubModel("masking", ratio=0.5, weight=0.25), augsub.SubModel("masking", ratio=0.25, weight=0.25)]
objective = CountingObjective(nn.CrossEntropyLoss(), masking)
train = importlib.import_module(LOOP).train
settings = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"} if LOOP == "lightning_module" else {}
train(model, objective, TensorDataset(images, labels), 1, **settings, **dict.fromkeys(OPTIONS, True))

flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
both = [torch.empty_like(flat) for _ in range(2)]
distributed.all_gather(both, flat)
if distributed.get_rank() == 0:
    print(json.dumps({"reduced": reduced, "parameters": flat.numel(), "apart": (both[0] - both[1]).abs().max().item()}))
distributed.destroy_process_group()
