"""parity: is a checkpoint computed here as transformers computes it, and streamed as it is defined?

    streamllm parity NAME_OR_FOLDER

What to run before trusting this library with a checkpoint of one's own. transformers is needed for it, and
for nothing else: pip install 'streamllm[parity]'. One model is in memory at a time: theirs is asked for its
logits and for what comes out of each layer, and released before ours is loaded; only where they differ are
both loaded again, to look into that one layer.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from torch import Tensor, nn

from streamllm.cache import SinkCache
from streamllm.load import LARGE_CHECKPOINT_BYTES, load_tokenizer, open_source
from streamllm.models.rotary import DynamicRope, LongRope, Rope
from streamllm.models.step import Plan, Step
from streamllm.tokenizer import TOKENIZER_FILES
from streamllm.weights.checkpoint import Checkpoint, StoredTensor
from streamllm.weights.errors import CheckpointError, UnsupportedConfig
from streamllm.weights.family import NOT_NEEDED, Fused
from streamllm.weights.source import Source

TOLERANCE = 5e-5  # times the spread of the logits, in float32
STREAMING_TOLERANCE = 1e-9  # the same in float64, against the definition
SHORT = 64  # tokens up to which float32 angles are exact enough to compare the default reading
HERE = 1e-4  # a module's output differs from here on, relative to its size
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INSTALL = "pip install 'streamllm[parity]'"

TEXT = """\
A stream has no last page. Whoever reads one keeps what was said a moment ago and forgets the rest, but for
the very beginning, which turns out to carry more weight than its words deserve: the first few tokens of a
text are looked at by every later one, whatever they say. Take them away and the reader loses the thread at
once; keep them, and a short memory is enough to go on for ever.

On Tuesday, 14 March 1893, the harbour master wrote: "Wind from the north-east, 11 knots; three ships in,
none out. The new lamp (cost: £42.50) burns well." Nobody answered. Was it true? It hardly mattered; by the
evening the fog had swallowed the lamp, the ships and the sea.

def moving_average(values, width=5):
    \"\"\"The mean of the last `width` values, one for each that comes.\"\"\"
    recent, total = [], 0.0
    for index, value in enumerate(values):
        recent.append(value)
        total += value
        if len(recent) > width:
            total -= recent.pop(0)
        yield index, total / len(recent)

for i, mean in moving_average([3, 1, 4, 1, 5, 9, 2, 6], width=3):
    print(f"{i:>2}: {mean:.2f}")

SELECT name, COUNT(*) AS visits FROM harbour WHERE year BETWEEN 1890 AND 1899 GROUP BY name ORDER BY 2 DESC;

{"ships": [{"name": "Aurora", "tons": 812}, {"name": "Bella", "tons": null}], "lamp": true}

Voilà: naïve résumés, 東京 and Москва, ½ + ¼ = ¾, and a tab\tbetween two words.
"""


@dataclass(frozen=True)
class Row:
    """One comparison of logits: differences in units of the spread (std) of the logits compared with."""

    what: str
    tokens: int
    maximum: float
    mean: float
    limit: float | None  # None: for information only
    by_mean: bool = False  # the limit is for the mean, else for the maximum

    @property
    def passed(self) -> bool:
        measured = self.mean if self.by_mean else self.maximum
        return self.limit is None or measured <= self.limit  # not for NaN


@dataclass(frozen=True)
class Difference:
    """Where two models begin to differ."""

    layer: int | None  # None: before or behind the layers
    ours: str  # the module in which it happens, by its name here
    theirs: str  # and in transformers
    parts: tuple[tuple[str, str], ...]  # the projections or norms within, where it can be narrowed down
    tensors: tuple[StoredTensor, ...]  # that these are read from
    before: float  # the largest difference of what goes in, relative to its size
    after: float  # and of what comes out


@dataclass
class Report:
    """What `compare` and `compare_streaming` found."""

    heading: list[tuple[str, str]]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    difference: Difference | None = None
    refused: bool = False  # it loads with match_transformers=True only

    @property
    def passed(self) -> bool:
        return not self.refused and all(row.passed for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


# Comparison with transformers


def compare(
    ours: str | os.PathLike[str] | None = None,
    theirs: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    tokens: int = 600,
    text: str | None = None,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Compare the logits of a checkpoint here and in transformers, without eviction.

    `ours` is a hub name, a folder, or None for the embedded checkpoint; `theirs` is what transformers reads,
    where that is another. `tokens` of `text` are compared (a built-in one; random ids where the checkpoint
    has no tokenizer). dtype: float32, bfloat16 or float16. `say` is told what is being done.

    float32 must agree up to 5e-5 of the logits' spread: with `match_transformers=True` at any length, and as
    the config says (the default) up to 64 tokens, beyond which transformers' float32 angles are too coarse.
    In a half type the mean difference must not exceed that of transformers from its own float32.

    Raises ImportError where transformers is not installed, CheckpointError where either cannot load the
    checkpoint, ValueError for other arguments out of range.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    version = _transformers().__version__
    source = open_source(ours, revision=revision)
    checkpoint = Checkpoint(source, match_transformers=True, allow_pickle=allow_pickle)
    where = _theirs_name(source, theirs)
    ids, words = _tokens(source, checkpoint, text, tokens, _longest(where, checkpoint))
    reference = Reference(where, checkpoint, device, say)
    count = ids.shape[1]
    short = min(SHORT, count)

    exact = reference.ask(ids, torch.float32, short)
    wanted = exact if dtype == "float32" else reference.ask(ids, DTYPES[dtype], short, points=False)
    report = Report(
        [
            (
                "model",
                f"{source.name} ({checkpoint.config_reader.get('model_type')}, {checkpoint.config.layers} layers)",
            ),
            ("text", f"{count} {words}"),
            ("against", f"transformers {version} ({reference.kernel}), {dtype}, {device}"),
        ]
    )

    def row(what: str, logits: Tensor, limited: bool = True) -> None:
        length = logits.shape[1]
        spread = wanted[length].logits.std().item()
        apart = (logits - wanted[length].logits).abs() / spread
        limit = TOLERANCE
        if dtype != "float32":
            limit = (wanted[length].logits - exact[length].logits).abs().mean().item() / spread
        maximum, mean = apart.max().item(), apart.double().mean().item()
        report.rows.append(
            Row(what, length, maximum, mean, limit if limited else None, by_mean=dtype != "float32")
        )

    say("running it here, as transformers rounds")
    model = checkpoint.load(DTYPES[dtype], device)
    with torch.inference_mode(), _quiet():
        row("as transformers rounds", model(ids.to(device)).float().cpu())
        cache = SinkCache(model, sinks=0, window=count, chunk=max(1, count // 3))
        row("the same through a cache, in chunks", model(ids.to(device), cache).float().cpu())
    del model, cache
    _release(checkpoint)
    matched = all(row.passed for row in report.rows)

    say("running it here, as the config says")
    plain, deviations = _as_the_config_says(source, checkpoint, allow_pickle)
    if plain is not None:
        model = plain.load(DTYPES[dtype], device)
        with torch.inference_mode():
            row("as the config says", model(ids[:, :short].to(device)).float().cpu(), not deviations)
            if count > short:
                row("as the config says", model(ids.to(device)).float().cpu(), False)
        del model
        _release(checkpoint)
    report.notes += [f"as the config says: {deviation}" for deviation in deviations]
    report.refused = plain is None

    if not all(row.passed for row in report.rows):
        say("looking for the first difference")
        chosen = checkpoint if not matched or plain is None else plain
        length = count if not matched else short
        report.difference = _locate(reference, chosen, ids[:, :length], exact[length], device)
        if report.difference is None:
            report.notes.append(
                f"in float32 every layer agrees: what differs is the rounding in {dtype}"
                if dtype != "float32"
                else "no layer stands out: the difference grows slowly from layer to layer"
            )
    return report


def _as_the_config_says(
    source: Source, matched: Checkpoint, allow_pickle: bool
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint in the default reading; and where transformers has its own, beside float32 angles."""
    try:
        plain = Checkpoint(source, allow_pickle=allow_pickle)
    except UnsupportedConfig as error:
        return None, [f"refused, {error}"]
    found = [
        f"{name} is {here} here, {there} in transformers; for information only"
        for name, here, there in _unlike(plain.config, matched.config)
        if not name.endswith("float32_angles")
    ]
    return plain, found


def _unlike(here: Any, there: Any, within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The numbers in which two configs are not the same."""
    for number in dataclasses.fields(here):
        name = number.name
        one, other = getattr(here, name), getattr(there, name)
        if dataclasses.is_dataclass(one) and type(one) is type(other):
            yield from _unlike(one, other, f"{within}{name}.")
        elif one != other:
            yield f"{within}{name}", one, other


@dataclass(frozen=True)
class Answer:
    """What a model said about a text: logits [1, T, V], and what came out of each point [1, T, C]."""

    logits: Tensor
    points: dict[str, Tensor]

    def first(self, length: int) -> Answer:
        return Answer(self.logits[:, :length], {name: x[:, :length] for name, x in self.points.items()})


class Reference:
    """A checkpoint in transformers, loaded when it is asked something and released at once."""

    def __init__(
        self,
        where: dict[str, Any],
        checkpoint: Checkpoint,
        device: str | torch.device,
        say: Callable[[str], object],
    ) -> None:
        self._where, self._checkpoint, self._device, self._say = where, checkpoint, device, say
        self.kernel = "sdpa"

    def ask(self, ids: Tensor, dtype: torch.dtype, short: int, points: bool = True) -> dict[int, Answer]:
        """The answers for all of `ids` [1, T] and for the first `short` of them, by their length."""
        answers = {}
        # These two change their frequencies with the length, and remember: each length needs a new model.
        rope = _rope(self._checkpoint.config)
        lengths = {ids.shape[1], short} if isinstance(rope, (DynamicRope, LongRope)) else {ids.shape[1]}
        for length in sorted(lengths):
            self._say(f"running it in transformers, {dtype_name(dtype)}")
            with self.model(dtype) as (model, names):
                found: dict[str, Tensor] = {}
                watch = _points(self._checkpoint) if points else []
                with _captured({names[ours]: ours for ours in watch if ours in names}, model, found):
                    logits = self.logits(model, ids[:, :length])
                del model
                answers[length] = Answer(logits, found)
        if short not in answers:
            answers[short] = answers[ids.shape[1]].first(short)
        return answers

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids.to(self._device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]

    @contextmanager
    def model(self, dtype: torch.dtype) -> Iterator[tuple[Any, dict[str, str]]]:
        """transformers' model, and its names for our modules."""
        transformers = _transformers()
        logging = transformers.utils.logging
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with _quiet():
                model = self._load(transformers.AutoModelForCausalLM.from_pretrained, dtype)
            yield model, _their_names(self._checkpoint, model)
        finally:
            model = None
            _release(self._checkpoint)
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()

    def _load(self, from_pretrained: Callable[..., Any], dtype: torch.dtype) -> Any:
        """With sdpa, their default: eager Falcon adds ALiBi twice. MPT has nothing but eager."""
        try:
            try:
                model = from_pretrained(**self._where, dtype=dtype, attn_implementation=self.kernel)
            except ValueError as error:
                if self.kernel == "eager" or "scaled_dot_product_attention" not in str(error):
                    raise
                self.kernel = "eager"
                model = from_pretrained(**self._where, dtype=dtype, attn_implementation=self.kernel)
        except (ValueError, OSError, KeyError, RuntimeError, AttributeError, TypeError) as error:
            reason = (
                next((line for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
            )
            raise CheckpointError(
                f"transformers cannot load {self._where['pretrained_model_name_or_path']}: {reason}"
            ) from error
        return model.eval().to(self._device)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"parity compares with transformers, which is not installed: {INSTALL}") from error
    return transformers


def _theirs_name(source: Source, theirs: str | os.PathLike[str] | None) -> dict[str, Any]:
    """What transformers is to load: the same commit, or the same folder."""
    if theirs is not None:
        return {"pretrained_model_name_or_path": os.path.expanduser(os.fspath(theirs))}
    commit = getattr(source, "commit", None)
    if commit is not None:
        return {"pretrained_model_name_or_path": source.name, "revision": commit}
    return {"pretrained_model_name_or_path": str(source.file("config.json").parent)}


def _longest(where: dict[str, Any], checkpoint: Checkpoint) -> int | None:
    """transformers' MPT ends at max_seq_len; the others do not mind a longer text."""
    if checkpoint.config_reader.get("model_type") != "mpt":
        return None
    return checkpoint.config_reader.size("max_seq_len", 2048)


def _tokens(
    source: Source, checkpoint: Checkpoint, text: str | None, count: int, longest: int | None
) -> tuple[Tensor, str]:
    """Ids [1, T] to compare on, and what they are, in words."""
    if count < 2:
        raise ValueError(f"tokens must be at least 2, not {count}")
    count = count if longest is None else min(count, longest)
    vocab_size = checkpoint.config.vocab_size
    if not any(source.find(name) for name in TOKENIZER_FILES[:2]):
        if text is not None:
            raise ValueError(f"{source.name} has no tokenizer to read a text with: leave the text out")
        ids = torch.randint(0, vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
        return ids, "random tokens (the checkpoint has no tokenizer)"
    folder = getattr(source, "commit", None)
    name = source.name if folder is not None else source.file("config.json").parent
    tokenizer = load_tokenizer(name, revision=folder)
    found = tokenizer.encode(TEXT if text is None else text)
    while text is None and len(found) < count:
        found += tokenizer.encode(TEXT, add_special_tokens=False)
    found = found[:count]
    if len(found) < 2:
        raise ValueError(f"the text has {len(found)} tokens; at least 2 are needed")
    if max(found) >= vocab_size:
        raise ValueError(f"token id {max(found)} is outside the model's vocabulary of 0 … {vocab_size - 1}")
    return torch.tensor([found]), f"tokens of {'the built-in text' if text is None else 'the text given'}"


# Where they part


def _points(checkpoint: Checkpoint) -> list[str]:
    """The modules whose outputs tell where two models part, in the order of the forward."""
    return ["embed", *(f"layers.{n}" for n in range(checkpoint.config.layers)), "norm"]


def _locate(
    reference: Reference, checkpoint: Checkpoint, ids: Tensor, theirs: Answer, device: str | torch.device
) -> Difference | None:
    """The first module that takes in what its twin takes in and gives out something else, in float32."""
    at: dict[str, float] = {}

    def measure(name: str, into: Any, out: Any) -> None:
        at[name] = apart(_tensor(out), theirs.points[name])

    logits = _watched(checkpoint, ids, list(theirs.points), measure, device)
    at["head"] = apart(logits, theirs.logits)
    points = [point for point in [*_points(checkpoint), "head"] if point in at]
    first = next((point for point in points if not at[point] <= HERE), None)
    if first is None:
        return None
    before = max((at[point] for point in points[: points.index(first)]), default=0.0)

    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with reference.model(torch.float32) as (model, names):
        leaves = [ours for ours in names if ours.startswith(first + ".")]
        with _captured({names[ours]: names[ours] for ours in leaves}, model, outputs, inputs):
            reference.logits(model, ids)
        del model
    if not first.startswith("layers."):
        stored = _stored(checkpoint, [first])
        return Difference(None, first, names.get(first, "?"), (), stored, before, at[first])

    parts = _parts(checkpoint)
    seen: list[tuple[str, float, float]] = []

    def measure_both(name: str, into: Any, out: Any) -> None:
        twin = _part(outputs[names[name]], parts.get(name), checkpoint.config)
        seen.append((name, apart(_tensor(into), inputs[names[name]]), apart(_tensor(out), twin)))

    leaves = [ours for ours in leaves if names[ours] in outputs]
    _watched(checkpoint, ids, leaves, measure_both, device)
    return _narrow(checkpoint, names, int(first.removeprefix("layers.")), before, at[first], seen)


def _watched(
    checkpoint: Checkpoint, ids: Tensor, names: Sequence[str], hook: Callable[[str, Any, Any], None],
    device: str | torch.device,
) -> Tensor:  # fmt: skip
    """Our logits in float32, while `hook` is told what the named modules take in and give out."""
    model = checkpoint.load(torch.float32, device)
    with torch.inference_mode(), _hooked(model, names, hook):
        return model(ids.to(device)).float().cpu()  # type: ignore[no-any-return]


def _narrow(
    checkpoint: Checkpoint, names: dict[str, str], layer: int, before: float, after: float,
    seen: list[tuple[str, float, float]],
) -> Difference:  # fmt: skip
    """From the differences that go into and come out of each leaf of a layer, in the order of the forward."""
    block = f"layers.{layer}"
    containers = {name for name, _, _ in seen if any(other.startswith(name + ".") for other, _, _ in seen)}
    seen = [one for one in seen if one[0] not in containers]
    guilty = [name for name, into, out in seen if into <= HERE and not out <= HERE]
    first = next((i for i, (_, into, out) in enumerate(seen) if not max(into, out) <= HERE), None)
    if first is not None and seen[first][0] in guilty:
        home = seen[first][0].rpartition(".")[0]
        guilty = [name for name in guilty if name.rpartition(".")[0] == home]
        into = max(into for name, into, _ in seen if name in guilty)
        out = max(out for name, _, out in seen if name in guilty)
        parts = tuple((name, names[name]) for name in guilty)
        return Difference(layer, home, names.get(home, "?"), parts, _stored(checkpoint, guilty), into, out)
    # All leaves before are right, and this one is given something else: it happens between them.
    home = block if first is None else seen[first][0].rpartition(".")[0]
    if first is not None and not any(name.startswith(home + ".") for name, _, _ in seen[:first]):
        home = block
    out = after if first is None else seen[first][1]
    into = max((max(one[1:]) for one in seen[:first]), default=before)
    return Difference(layer, home, names.get(home, "?"), (), (), into, out)


def _parts(checkpoint: Checkpoint) -> dict[str, tuple[Fused, int]]:
    """Our modules that are a part of one of theirs: which one."""
    found = {}
    for target in checkpoint.family.tensors.values():
        if isinstance(target, Fused):
            for index, name in enumerate(target.names):
                for layer in range(checkpoint.config.layers):
                    found[name.rpartition(".")[0].replace("{}", str(layer))] = (target, index)
    return found


def _part(output: Tensor, part: tuple[Fused, int] | None, config: Any) -> Tensor:
    """What our module must give out, from what theirs gives out [1, T, rows]."""
    if part is None:
        return output
    fused, index = part
    return fused.split(output[0].T.contiguous(), config)[index].T[None]


def _their_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Our modules' names -> transformers', derived from the names of tensors on both sides.

    Where `model.layers.{}.self_attn.q_proj.weight` is `layers.{}.attention.q.weight`, the modules that hold
    them correspond, and those that hold these: model.layers.{}.self_attn is layers.{}.attention, and so on.
    """
    theirs = dict(model.named_modules())
    patterns: dict[str, list[str]] = {}
    for there, target in checkpoint.family.tensors.items():
        if target == NOT_NEEDED:
            continue
        for here in target.names if isinstance(target, Fused) else (target,):
            ours, twin = here, there
            while "." in ours and "." in twin:
                ours, twin = ours.rpartition(".")[0], twin.rpartition(".")[0]
                patterns.setdefault(ours, []).append(twin)
    names: dict[str, str] = {}
    for here, twins in patterns.items():
        for layer in map(str, range(checkpoint.config.layers if "{}" in here else 1)):
            for twin in twins:
                found = twin.replace("{}", layer)
                if found in theirs and ("{}" in here) == ("{}" in twin):
                    names.setdefault(here.replace("{}", layer), found)
    head = model.get_output_embeddings()  # type: ignore[operator]
    in_memory = next((name for name, module in theirs.items() if module is head), None)
    return names if in_memory is None else {**names, "head": in_memory}


def _stored(checkpoint: Checkpoint, modules: Sequence[str]) -> tuple[StoredTensor, ...]:
    """The tensors on disk that our modules are made of."""
    wanted = {*modules, *(["embed"] if "head" in modules and checkpoint.config.tied else [])}
    found = []
    for stored in checkpoint.tensors.values():
        target, layer = checkpoint.family.target(stored.name) or (NOT_NEEDED, "")
        names = target.names if isinstance(target, Fused) else (target,)
        if any(name.rpartition(".")[0].replace("{}", layer) in wanted for name in names):
            found.append(stored)
    return tuple(found)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, each relative to its own value and the values' usual size; inf where none."""
    if ours.shape != theirs.shape and ours.dim() == 4:
        ours = ours.transpose(1, 2)  # [B, H, T, D] and [B, T, H, D]
    if ours.shape != theirs.shape:
        return float("inf")
    size = theirs.square().mean().sqrt()
    worst = ((ours - theirs).abs() / (theirs.abs() + size)).max().item()
    return worst if worst == worst else float("inf")


def _tensor(found: Any) -> Tensor:
    """The first tensor of what a module takes in or gives out, in float32 on the CPU."""
    while isinstance(found, (tuple, list)):
        found = found[0]
    return found.detach().float().cpu()  # type: ignore[no-any-return]


@contextmanager
def _hooked(model: nn.Module, names: Sequence[str], hook: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """While it lasts, `hook` is told what each named module takes in and gives out."""
    handles = []
    try:
        for name in names:

            def on_forward(
                _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, name: str = name
            ) -> None:
                hook(name, args or tuple(kwargs.values()), output)

            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(on_forward, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _captured(
    names: dict[str, str],
    model: nn.Module,
    outputs: dict[str, Tensor],
    inputs: dict[str, Tensor] | None = None,
) -> Any:
    """Keep what the modules give out (and take in), by the names that `names` has for them."""

    def keep(name: str, into: Any, out: Any) -> None:
        outputs[names[name]] = _tensor(out)
        if inputs is not None:
            inputs[names[name]] = _tensor(into)

    return _hooked(model, list(names), keep)


# Streaming, against the definition


def compare_streaming(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    text: str | None = None,
    sinks: int = 4,
    window: int = 28,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Report:
    """Compare a stream far past eviction with its definition, in float64.

    The definition, computed as plainly as it is said (see `Plain`): each token alone, all keys that it sees
    turned anew to their places in the cache. Against it, the cache: token by token, in chunks, all at once,
    and far away in the text. They must agree up to 1e-9 of the logits' spread.

    Arguments and errors as for `compare`; transformers is not needed.
    """
    source = open_source(name, revision=revision)
    checkpoint = Checkpoint(source, allow_pickle=allow_pickle)
    ids, words = _tokens(source, checkpoint, text, 4 * (sinks + window), None)
    count = ids.shape[1]
    window = max(1, min(window, count // 2 - sinks))  # a short text: less of it is seen at once
    say("loading in float64")
    model = checkpoint.load(torch.float64, device)
    report = Report(
        [
            ("streaming", f"{sinks} sinks and {window} recent tokens, the first goes after {sinks + window}"),
            ("text", f"{count} {words}"),
            ("against", "the definition, token by token: keys turned anew to their places in the cache"),
        ]
    )
    with torch.inference_mode(), _quiet():
        say("computing the definition")
        wanted = plainly(model, ids.to(device), sinks, window)
        spread = wanted.std().item()

        def row(what: str, chunk: int, origin: int = 0) -> None:
            say(f"streaming, {what}")
            cache = SinkCache(model, sinks=sinks, window=window, chunk=chunk, origin=origin)
            off = (model(ids.to(device), cache) - wanted).abs() / spread
            report.rows.append(Row(what, count, off.max().item(), off.mean().item(), STREAMING_TOLERANCE))
            bad = (~(off[0] <= STREAMING_TOLERANCE)).any(-1).nonzero()
            if len(bad):
                report.notes.append(f"{what}: the first token that differs is {int(bad[0])}, counted from 0")

        row("token by token", 1)
        row("in chunks of 7", 7)
        row("all at once", count)
        row("after a billion tokens, in chunks of 7", 7, 10**9)
    return report


def plainly(model: nn.Module, ids: Tensor, sinks: int, window: int) -> Tensor:
    """The logits [1, T, V] of a stream by its definition: no ring, no slots, no chunks."""
    geometry: Any = model.geometry
    rope = _rope(model.config)
    kept = {own: sinks + (window if own is None else min(window, own)) for own in set(geometry.windows)}
    stores = [Plain(rope, sinks, kept[own]) for own in geometry.windows]
    logits = []
    for t in range(ids.shape[1]):
        steps = {own: _alone(min(t + 1, total), total, ids.device) for own, total in kept.items()}
        logits.append(model.project(model.hidden(ids[:, t : t + 1], Plan(steps, stores))))  # type: ignore[operator]
    return torch.cat(logits, 1)


def _alone(keys: int, span: int, device: torch.device) -> Step:
    """One token, the last of `keys` in the cache. Its own key is turned by nothing: `Plain` turns it."""
    places = torch.arange(keys, device=device)[None]
    here, nowhere = places[:, -1:], torch.zeros_like(places[:, -1:])
    # One sink, seen from where the rest is seen from: only then does a Step turn keys and queries apart.
    return Step(slots=here, near=here, far=here, own=nowhere, keys=places, visible=None, sinks=1, span=span)


class Plain:
    """One layer's memory by the definition: sinks and last tokens, unturned, in the order of the text."""

    def __init__(self, rope: Rope | None, sinks: int, total: int) -> None:
        self.rope, self.sinks, self.total = rope, sinks, total
        self.keys: list[Tensor] = []  # [B, G, 1, D] each
        self.values: list[Tensor] = []

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for held, new in ((self.keys, k), (self.values, v)):
            held.append(new)
            if len(held) > self.total:
                del held[self.sinks]
        return self._turned(torch.cat(self.keys, 2)), torch.cat(self.values, 2)

    def _turned(self, keys: Tensor) -> Tensor:
        """Each key, turned to its place in the cache: half with half, as complex numbers."""
        if self.rope is None:
            return keys
        inverse = self.rope.frequencies(self.total).to(keys)
        half = len(inverse)
        angles = torch.arange(keys.shape[2]).to(keys)[:, None] * inverse  # [K, dim/2]
        turned = torch.complex(keys[..., :half], keys[..., half : 2 * half])
        turned = turned * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag, keys[..., 2 * half :]), -1)


# Small things


def _rope(config: Any) -> Rope | None:
    """The rotary encoding among a config's numbers, whatever the family calls it."""
    values = (getattr(config, number.name) for number in dataclasses.fields(config))
    return next((value for value in values if isinstance(value, Rope)), None)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _release(checkpoint: Checkpoint) -> None:
    """Let go of a large model before the next is loaded; a small one may wait for its turn."""
    if checkpoint.nbytes >= LARGE_CHECKPOINT_BYTES:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: windows longer or shorter than is wise are what is compared here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _lines(report: Report) -> Iterator[str]:
    for name, value in report.heading:
        yield f"{name:<10} {value}"
    yield ""
    yield f"{'':38} {'tokens':>7} {'max':>9} {'mean':>9}   must be"
    for row in report.rows:
        limit = "" if row.limit is None else f"{'mean' if row.by_mean else 'max'} ≤ {row.limit:.1e}"
        verdict = "" if row.limit is None else "ok" if row.passed else "DIFFERS"
        line = f"{row.what:<38} {row.tokens:>7,} {row.maximum:>9.1e} {row.mean:>9.1e}   {limit:<15} {verdict}"
        yield line.rstrip()
    yield "(differences of logits, in units of their spread)"
    if report.notes or report.difference:
        yield ""
    yield from report.notes
    if report.difference is not None:
        yield from _difference_lines(report.difference)


def _difference_lines(found: Difference) -> Iterator[str]:
    where = f"layer {found.layer}" if found.layer is not None else f"the {found.ours}"
    yield f"the first difference is in {where}: {found.before:.0e} before it, {found.after:.0e} after"
    rows = [("here", "in transformers"), (found.ours, found.theirs), *found.parts]
    width = max(len(ours) for ours, _ in rows)
    for ours, theirs in rows:
        yield f"  {ours:<{width}}  {theirs}"
    if found.tensors:
        yield "read from"
        for stored in found.tensors:
            yield f"  {stored.name} {list(stored.shape)} {stored.dtype} in {stored.path.name}"
    elif found.layer is not None:
        yield "no tensor is at fault: what goes wrong is computed between them"


@click.command()
@click.argument("name", metavar="[NAME|FOLDER]", required=False)
@click.option("--revision", help="Branch, tag, commit or refs/pr/N of a hub repository.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="float32",
    show_default=True,
    help="The type compared in.",
)
@click.option(
    "--tokens", type=click.IntRange(2), default=600, show_default=True, help="How many tokens to compare."
)
@click.option(
    "--text", type=click.File("r", encoding="utf-8"), help="A text to compare on.  [default: built in]"
)
@click.option(
    "--streaming", is_flag=True, help="Compare past eviction, too: in float64, against the definition."
)
@click.option("--device", default="cpu", show_default=True, help="Where both compute.")
@click.option(
    "--allow-pickle", is_flag=True, help="Read weights that exist only as a pickle; it could run code."
)
@click.pass_context
def parity(
    ctx: click.Context, name: str | None, revision: str | None, dtype: str, tokens: int, text: Any,
    streaming: bool, device: str, allow_pickle: bool,
) -> None:  # fmt: skip
    """Compare a checkpoint with transformers: hub name or folder.

    Run this before you trust a checkpoint of your own to this library. Prints how far the logits are apart,
    and where that is too far, the first layer that differs. Exit code 0: the same; 1: not; 2: it could not be
    compared. Needs transformers: pip install 'streamllm[parity]'.
    """

    def say(what: str) -> None:
        click.echo(f"… {what}", err=True)

    words = None if text is None else text.read()
    both: dict[str, Any] = {"revision": revision, "text": words, "device": device, "say": say}
    both["allow_pickle"] = allow_pickle
    try:
        report = compare(name, dtype=dtype, tokens=tokens, **both)
    except ImportError as error:
        raise click.UsageError(str(error)) from error
    click.echo(str(report))
    passed = report.passed
    if streaming and not report.refused:
        streamed = compare_streaming(name, **both)
        click.echo(f"\n{streamed}")
        passed = passed and streamed.passed
    verdict = "NOT the same: please report it"
    if passed:
        verdict = "the same: this checkpoint can be trusted here"
    elif report.refused and report.difference is None:
        verdict = "refused: what transformers ignores in this config cannot be done here"
    click.echo(f"\n{verdict}")
    ctx.exit(0 if passed else 1)
