"""The loops, each once: search an epoch, train an epoch, evaluate."""

import math
import time

import torch
from torch import nn
from tqdm import tqdm

from architect import search_step
from harness import distributed
from harness.costs import peak_memory
from utils import AverageMeter, UserError, accuracy


class Figures:
    """Loss, top-1 and top-5 of an epoch, and its speed; shows them as it goes.

    run: a runs.Run, whose epoch this is; None in an evaluation. Where the run was resumed within
    the epoch, the figures go on from the checkpoint's, run.unfinished, which is then None.
    """

    def __init__(self, name, loader, report_freq, log, run=None):
        self.loss, self.top1, self.top5 = AverageMeter(), AverageMeter(), AverageMeter()
        self.meters = (self.loss, self.top1, self.top5)
        self.name, self.loader, self.report_freq, self.log = name, loader, report_freq, log
        self.step, self.start, self.run = 0, time.perf_counter(), run
        self.bad = -1  # the first step that was not finite
        self.seconds = None  # of all steps, when they are done
        if run is not None and run.unfinished is not None:
            self._load(run.unfinished)
            run.unfinished = None
        # On a terminal a progress bar, elsewhere plain lines; None: tqdm looks which it is.
        quiet = None if distributed.is_main() else True
        self.bar = tqdm(
            loader, desc=name, leave=False, disable=quiet, dynamic_ncols=True, initial=self.step,
            total=len(loader),
        )  # fmt: skip

    def steps(self):
        """(x, y) of each step; in between the figures are shown every `report_freq` steps."""
        if self.step >= len(self.loader):  # resumed after the last
            if self.run is not None:
                self.run.figures = self  # for a signal in the evaluation that follows
            return
        for batch in self.bar:
            yield batch
            if (self.step - 1) % self.report_freq == 0:
                self.check()
                shown = f"loss {self.loss.avg:.4f}, top-1 {self.top1.avg:.2f} %"
                if self.bar.disable:
                    step = self.name, self.step - 1, len(self.loader)
                    self.log.info("%s step %d of %d: %s", *step, shown)
                else:
                    self.bar.set_postfix_str(shown)

    def update(self, loss, logits, y, norm=None):
        """Adds a step; norm: of its gradient.

        Where it or the loss is not finite: UserError, on a CPU at once, else at the next `check`.
        """
        top1, top5 = accuracy(logits.detach(), y, topk=(1, 5))
        for meter, value in zip(self.meters, (loss, top1, top5), strict=True):
            meter.update(value, len(y))
        if norm is not None:
            bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm))
            if bad.device.type == "cpu":
                self.bad = self.step if bad else self.bad
                self.check()
            elif isinstance(self.bad, int):
                self.bad = torch.where(bad, self.step, -1)
            else:  # looked at later, so that no step waits for the device
                self.bad = torch.where((self.bad < 0) & bad, self.step, self.bad)
        self.step += 1

    def check(self):
        """Raises UserError where a step's loss or gradient was NaN or infinite."""
        if int(self.bad) >= 0:
            epoch = "" if self.run is None else f"epoch {self.run.epoch + 1}, "
            raise UserError(
                f"the loss or its gradient is NaN or infinite in {epoch}step {int(self.bad)}: "
                "lower --learning_rate, or --arch_learning_rate of a search; "
                "--detect_anomaly finds where"
            )

    def state_dict(self):
        """Of all processes; checked, so that no checkpoint follows a step that was not finite."""
        self.check()
        sums = [torch.as_tensor(meter.sum).cpu() for meter in self.meters]
        seconds = self.seconds or time.perf_counter() - self.start
        each = distributed.gather({"sums": sums, "count": self.loss.cnt})
        return {"step": self.step, "seconds": seconds, "each": each}

    def _load(self, state):
        self.step, self.start = state["step"], self.start - state["seconds"]
        each, processes = state["each"], distributed.world_size()
        if len(each) != processes:  # the first takes all
            sums = [sum(values) for values in zip(*(one["sums"] for one in each), strict=True)]
            each = [{"sums": sums, "count": sum(one["count"] for one in each)}]
            each += [{"sums": [0.0] * 3, "count": 0}] * (processes - 1)
        mine = each[distributed.rank()]
        for meter, value in zip(self.meters, mine["sums"], strict=True):
            meter.sum = value.to(self.loader.device) if torch.is_tensor(value) else value
            meter.cnt = mine["count"]

    def result(self, device):
        """The figures over the images of all processes."""
        self.check()
        sums = [meter.sum for meter in self.meters]
        *sums, images = distributed.total([*sums, float(self.loss.cnt)], device)  # waits for it
        loss, top1, top5 = (value / max(images, 1) for value in sums)
        seconds = self.seconds = time.perf_counter() - self.start
        return {
            "images": int(images),
            "loss": loss,
            "top1": top1,
            "top5": top5,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "memory_mib": peak_memory(device),
        }


def search_epoch(loader, valid_batches, model, gradients, architect, optimizer, args, frozen, run):
    """One epoch of bilevel search: an architect.search_step for each batch of `loader`.

    See docs/differences.md, 2 and 3.

    valid_batches: endless (x, y) of the validation half, read only where alphas and betas are not
    frozen. gradients: fused.Gradients of the training loss. args: unrolled, grad_clip,
    report_freq. run: a runs.Run. Returns the training figures as a dict.
    """
    model.train()
    weights = model.weights()
    figures = Figures("search", loader, args.report_freq, run.log, run)
    for x, y in figures.steps():
        valid = None if frozen else next(valid_batches)
        distributed.broadcast(model.resample())  # the channels of --sampling random; else nothing
        loss, logits, norm = search_step(
            (x, y), valid, weights, gradients, architect, optimizer, args
        )
        figures.update(loss, logits, y, norm)
        run.step(figures)
    return figures.result(loader.device)


def classify(model, criterion, x, y, args):
    """(loss, logits) of a discrete network, the auxiliary head's loss added."""
    logits, logits_aux = model(x)
    loss = criterion(logits, y)
    if args.auxiliary:
        loss = loss + args.auxiliary_weight * criterion(logits_aux, y)
    return loss, logits


def train_epoch(loader, model, criterion, optimizer, args, run, forward=classify):
    """One epoch of a discrete network; returns the training figures as a dict.

    args: amp, grad_clip (or None), report_freq, and those of `forward`, which gives loss and logits
    of a batch. run: a runs.Run.
    """
    model.train()
    figures = Figures("train", loader, args.report_freq, run.log, run)
    for x, y in figures.steps():
        optimizer.zero_grad()
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=args.amp):
            total, logits = forward(model, criterion, x, y, args)
        # The share of this process, since gradients are averaged; 1 if it is alone.
        (total * distributed.share(len(y), loader.device)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        figures.update(total, logits, y, norm)
        run.step(figures)
    return figures.result(loader.device)


@torch.no_grad()
def evaluate(loader, model, criterion, args, log, run=None):
    """Loss, top-1 and top-5 (%) over `loader`, of a supernet or a discrete network.

    run: a runs.Run that a signal may end here.
    """
    model.eval()
    figures = Figures("evaluate", loader, args.report_freq, log)
    for x, y in figures.steps():
        if len(y):  # a process may have no image of the last batch
            logits = model(x)
            logits = logits[0] if isinstance(logits, tuple) else logits
            figures.update(criterion(logits, y), logits, y)
        if run is not None:
            run.evaluating()
    return figures.result(loader.device)


def learning_rate(epoch, epochs, base, schedule, warm_up, last=0.0):
    """The learning rate of epoch 0, 1, ... of an ImageNet run, as published.

    "cosine": from `base` to `last`. "linear": down to base / (epochs - 5), then in the last five
    epochs towards zero. warm_up: in the first five epochs it rises to `base` instead.
    """
    left = epochs - epoch
    if warm_up and epoch < 5:
        return base * (epoch + 1) / 5
    if schedule == "cosine":
        return last + (base - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    if epochs <= 5:  # docs/differences.md, 14
        return base * left / epochs
    return base * (left - 5) / (epochs - 5) if left > 5 else base * left / ((epochs - 5) * 5)
