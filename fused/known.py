"""What the fast form stands for: modules that nobody has changed, of classes with these very texts.

Figures of two small cells do not show what a change does at other sizes, widths or precisions,
seldom, or beside the output; so a class of another text is run as it is.
`python -m fused.known` prints the digests anew, for when the fast form has followed a change.
"""

import functools
import hashlib
import inspect
import io
import tokenize

from torch import nn
from torch.nn.modules import module as torch_module

from fused.functions import EPS, MOMENTUM
from operations import FactorizedReduce, ReLUConvBN

WRITTEN_FOR = {
    "MixedOp": "080d487e9af5c25e",
    "Cell": "67bda8d3eee88b9d",
    "ReLUConvBN": "44fb556d41417056",
    "FactorizedReduce": "d1992f06cb93bdca",
    "SepConv": "7bb06a18014d4725",
    "DilConv": "52bd5f49c7693298",
    "Identity": "cc8dc151709c67f0",
    "Zero": "26d92b3d9241d376",
}
HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
FOREIGN = ("torch.", "builtins", "fused.")  # modules whose classes nobody edits
SIGNS = {tokenize.NEWLINE: ";", tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def unfamiliar(kind):
    """None, or in a few words which base of a type, or itself, has another text. torch's do not."""
    for c in kind.__mro__:
        if not c.__module__.startswith(FOREIGN):
            names = {name: v for name, v in vars(c).items() if not _of_python(name, v)}
            if names and not _is_known(c.__name__, tuple(names.items())):
                return f"{c.__name__} has another text than the one it was written for"
    return None


def _of_python(name, value):
    return name.startswith("__") and not inspect.isroutine(value)


@functools.cache
def _is_known(name, attributes):
    """Whether a class holds nothing but the functions with these texts."""
    functions = dict(attributes)
    try:
        return digest(functions) == WRITTEN_FOR.get(name)
    except (AttributeError, OSError):  # no function, or none with a text
        return False


def digest(functions):
    """Of the texts of {name: function}, as they are now; comments and docstrings do not count."""
    texts = [f"{name}: {_text(value.__code__)}" for name, value in sorted(functions.items())]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _text(code):
    """The text of a function without what does not change it, the same in every Python."""
    text, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(code)).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if before == tokenize.INDENT and token.type == tokenize.STRING:
            before = "docstring"
        elif before == "docstring":  # the end of its line
            before = None
        else:
            text.append(SIGNS.get(token.type, token.string))
            before = token.type
    return "".join(text)


def hooks(attributes, prefix=""):
    """The dicts of hooks that a call of a module runs, of one module or of all."""
    return [attributes[prefix + name] for name in HOOKS]


def strange(cell, plan, parts):
    """None, or in a few words what of a cell is not as the fast form knows it.

    parts: its modules, but for those inside the operations that run as they are.
    """
    for kind in dict.fromkeys(map(type, parts)):
        if unfamiliar(kind):
            return unfamiliar(kind)
    for part in parts:
        name = type(part).__name__
        if any(hooks(vars(part))):
            return f"hooks of {name}"
        if "forward" in vars(part):
            return f"the forward of one {name}"
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            if type(part) is not cell.norm:
                return name
            if part.training != cell.training:
                return "batch norms in another mode than their cell"
            without = part.running_mean is None or part.affine
            if without or (part.momentum, part.eps) != (MOMENTUM, EPS):
                return "other momentum, eps, weights or statistics of batch norms"
    if any(hooks(vars(torch_module), "_global")):
        return "hooks of all modules"
    for block in (cell.preprocess0, cell.preprocess1):
        if type(block) not in (ReLUConvBN, FactorizedReduce):
            return f"the preprocess {type(block).__name__}"
    k, others = cell._ops[0].k, plan.kinds.others
    built = {
        stride: [_built(op) for o, op in enumerate(ops) if o not in others]
        for stride, ops in ((1, plan.ops[-1]), (2, plan.ops[0]))
    }
    for wave in plan.waves:
        for edge in (cell._ops[e] for e in wave.edges):
            if (edge.k, edge.stride, edge.sampling) != (k, wave.stride, cell.sampling):
                return f"an edge with k={edge.k}, stride={edge.stride}, {edge.sampling}"
            ops = [_built(op) for o, op in enumerate(edge._ops) if o not in others]
            if ops != built[wave.stride]:
                return "an edge that is not built as the others"
    return None


def _built(op):
    """Everything of the modules of an operation but their tensors."""
    return [
        (type(m), list(m._modules), {k: v for k, v in vars(m).items() if k[0] != "_"},
         [p is None or p.shape for p in (*m._parameters.values(), *m._buffers.values())])
        for m in op.modules()
    ]  # fmt: skip


def functions_of(c):
    """{name: function} of what a class itself holds."""
    return {name: value for name, value in vars(c).items() if inspect.isroutine(value)}


if __name__ == "__main__":
    import model_search
    import operations

    names = "ReLUConvBN FactorizedReduce SepConv DilConv Identity Zero".split()
    for c in (model_search.MixedOp, model_search.Cell, *(getattr(operations, n) for n in names)):
        print(f'    "{c.__name__}": "{digest(functions_of(c))}",')
