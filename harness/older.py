"""Checkpoints of searches that earlier versions began."""

from fused import FastForward
from fused.plan import Plan


def by_edge(state, model):
    """The state dict of the weights' optimizer, with an entry for each weight of the model.

    Earlier versions kept the weights of a fast cell stacked, those of all edges in one tensor.
    Any other state is returned as it is.
    """
    groups, weights = state["param_groups"], list(model.parameters())
    cells = [module for module in model.modules() if isinstance(module, FastForward)]
    plans = {cell: Plan(cell) for cell in cells}
    if len(groups) != 1 or not cells or any(plan.why for plan in plans.values()):
        return state
    stacks = [stack for module in model.children() for stack in _stacks(module, plans)]
    if not len(groups[0]["params"]) == len(stacks) != len(weights):
        return state
    place = {id(weight): i for i, weight in enumerate(weights)}
    entries = {}
    for number, stack in zip(groups[0]["params"], stacks, strict=True):
        for i, weight in enumerate(stack):
            entries[place[id(weight)]] = {
                name: value.reshape(len(stack), *weight.shape)[i].clone() if value.dim() else value
                for name, value in state["state"].get(number, {}).items()
            }
    groups = [groups[0] | {"params": list(range(len(weights)))}]
    return {"state": {i: entry for i, entry in entries.items() if entry}, "param_groups": groups}


def _stacks(module, plans):
    """The weights of a module in the order of that time, as lists: each was one tensor."""
    if module not in plans:
        yield from ([weight] for weight in module.parameters(recurse=False))
        for child in module.children():
            yield from _stacks(child, plans)
        return
    plan = plans[module]
    kinds, ops = plan.kinds, plan.ops
    for block in (module.preprocess0, module.preprocess1):
        yield from ([weight] for weight in block.parameters())
    # The places of depthwise convolutions in an op, before their 1x1 ones.
    groups = [(kinds.seps, 1), (kinds.seps, 5), (kinds.dils, 1)]
    for places, at in groups:
        yield from ([edge[o].op[at].weight for edge in ops] for o in places)
    for places, at in groups:
        if places:
            yield [edge[o].op[at + 1].weight for edge in ops for o in places]
    for half in (0, 1):
        yield from ([conv.weight for conv in pair[half]] for pair in plan.halves)
    for edge in module._ops:
        yield from ([weight] for o in kinds.others for weight in edge._ops[o].parameters())
