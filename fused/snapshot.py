"""Modules as they are, to see whether somebody has changed one since."""

from torch.nn.modules import module as torch_module

HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"


class Snapshot:
    """What a call of these modules depends on, but for the values of tensors.

    Types, functions of classes, attributes (not what is inside of a list or another object),
    children and hooks; with tensors=True also which tensors they have, and where in memory. more:
    further types.
    """

    def __init__(self, modules, more=(), tensors=False):
        self.modules, self.types = modules, [type(module) for module in modules]
        classes = dict.fromkeys(c for kind in {*more, *self.types} for c in kind.__mro__)
        self.dicts = [vars(c) for c in classes]
        self.dicts += hooks(vars(torch_module), "_global")
        for module in modules:
            self.dicts += [module._modules, *hooks(vars(module))]
        owners = [d for module in modules for d in (module._parameters, module._buffers)] * tensors
        self.owners = [d for d in owners if d]
        every = self.dicts + owners
        # Most are empty, as of hooks: to see that they still are is faster than to compare them.
        self.empty, self.dicts = [d for d in every if not d], [d for d in every if d]
        self.kept, self.places = [dict(d) for d in self._now()], self._places()

    def _now(self):
        return self.dicts + [_attributes(module) for module in self.modules]

    def _places(self):
        return [v is not None and v.data_ptr() for d in self.owners for v in d.values()]

    def holds(self):
        """Whether nothing of it has changed."""
        try:
            return (
                not any(self.empty)
                and self._now() == self.kept
                and list(map(type, self.modules)) == self.types
                and self._places() == self.places
            )
        except (RuntimeError, ValueError, TypeError):  # attributes that cannot be compared
            return False


def _attributes(module):
    """Those of a module, without the plans of a fast cell, which it makes when it needs them."""
    own = vars(module)
    return {**own, "_plans": None} if "_plans" in own else own


def hooks(attributes, prefix=""):
    """The dicts of hooks that a call of a module runs: of one module, or of all."""
    return [attributes[prefix + name] for name in HOOKS]
