"""The contract: what is asked (`PlanningRequest`) and what a plan is (`Plan`).

One family of pydantic models serves the YAML file, the REST body and the web form. They are
frozen and refuse unknown fields, so that a misspelt name is an error and not a default.
`parse_request` and `parse_plan` turn every validation failure into an `InputError` with the
field's path and one sentence.
"""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from hardware import InputError

SCHEMA_VERSION = "1"

ServingMode: TypeAlias = Literal["aggregated", "disaggregated"]
EngineName: TypeAlias = Literal["vllm", "sglang", "trtllm"]
WeightFormat: TypeAlias = Literal["bf16", "fp16", "fp8", "int8", "int4", "fp4"]
KvFormat: TypeAlias = Literal["bf16", "fp16", "fp8", "int8", "int4", "fp4", "int2"]
Objective: TypeAlias = Literal["latency", "throughput", "energy", "memory", "cost", "ttft", "tpot"]
Method: TypeAlias = Literal["auto", "exhaustive", "cp-sat", "mcts"]
Percentile: TypeAlias = Literal["mean", "p50", "p90", "p95", "p99"]


def _whole(value: Any) -> Any:
    """A whole number is one however it is written: 1000.0 and 1e3 too, as JSON schema has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000, strict=True), WHOLE]
# Strict: neither `true` nor "4" is a number (whole numbers pass as floats).
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]


def _not_tiny(value: float) -> float:
    if value < _LEAST:
        raise ValueError(f"must be at least {_LEAST:g}, not {value:g}")
    return value


# Bounds far beyond anything real, near enough that no product, square or quotient of them overflows.
_LEAST, _MOST = 1e-9, 1e9
Amount = Annotated[float, Field(gt=0, le=_MOST, allow_inf_nan=False, strict=True), AfterValidator(_not_tiny)]
AmountOrZero = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def _hertz(value: float) -> float:
    if value < 1e6:
        raise ValueError(f"is in Hz: write {value:g} MHz as {value * 1e6:g}")
    return value


Clock = Annotated[float, Field(gt=0, le=1e10, allow_inf_nan=False, strict=True), AfterValidator(_hertz)]


class StrictModel(BaseModel):
    """Frozen, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# --- what is asked -------------------------------------------------------------------------


class Engine(StrictModel):
    """The serving engine; without a version its newest profile."""

    name: EngineName = "vllm"
    version: str | None = None

    @field_validator("version", mode="before")
    @classmethod
    def _version_text(cls, value: Any) -> Any:
        # YAML reads an unquoted 0.24 as a number; the text is what was meant.
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


class PoolRequest(StrictModel):
    """A pool of equal devices, or a topology file (command line only)."""

    name: str = "main"
    device: str | None = None
    nodes: PositiveInt = 1
    devices_per_node: PositiveInt | None = None
    topology: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> PoolRequest:
        if (self.device is None) == (self.topology is None):
            raise ValueError("give either `device` or `topology`")
        return self


class InterNode(StrictModel):
    """The network between nodes, by its catalog name."""

    kind: Annotated[str, Field(min_length=1)]


class ClusterRequest(StrictModel):
    """The machines; several pools make a heterogeneous cluster."""

    pools: Annotated[tuple[PoolRequest, ...], Field(min_length=1, max_length=64)]
    inter_node: InterNode | None = None

    @model_validator(mode="after")
    def _unique_names(self) -> ClusterRequest:
        names = [pool.name for pool in self.pools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"pool names must differ, {twice[0]!r} stands twice")
        return self


class TraceRequest(StrictModel):
    """A recorded trace; the format is told by its content."""

    path: str
    format: Literal["auto", "planfront", "apex", "azure", "burstgpt", "mooncake"] = "auto"
    rate_scale: Amount = 1.0
    limit: PositiveInt | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"


class Arrivals(StrictModel):
    """When requests come. `closed`: `concurrency` clients, each waiting for its answer."""

    process: Literal["poisson", "gamma", "constant", "burst", "closed"]
    rate_rps: Amount | None = None
    cv: (
        Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False, strict=True), AfterValidator(_not_tiny)]
        | None
    ) = None
    concurrency: PositiveInt | None = None
    size: PositiveInt | None = None


class Lengths(StrictModel):
    """How long inputs or outputs are, in tokens."""

    distribution: Literal["constant", "uniform", "lognormal", "empirical"]
    value: PositiveInt | None = None
    low: PositiveInt | None = None
    high: PositiveInt | None = None
    mean: Amount | None = None
    cv: Annotated[float, Field(ge=0, le=1e3, allow_inf_nan=False, strict=True)] | None = None
    min: PositiveInt | None = None
    max: PositiveInt | None = None
    values: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=1_000_000)] | None = None


class SharedPrefix(StrictModel):
    """Prompts of one group begin with the same `tokens` tokens."""

    tokens: PositiveInt
    groups: PositiveInt = 1


class Turns(StrictModel):
    """Multi-turn conversations: the history comes back as input."""

    mean: Annotated[float, Field(ge=1, le=10_000, allow_inf_nan=False, strict=True)] = 1.0
    think_time_s: AmountOrZero = 0.0


class Synthetic(StrictModel):
    """A workload drawn from distributions; `preset` fills what is left out."""

    preset: str | None = None
    arrivals: Arrivals | None = None
    requests: Annotated[int, Field(ge=1, le=20_000_000, strict=True), WHOLE] | None = None
    input_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    shared_prefix: SharedPrefix | None = None
    turns: Turns | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True), WHOLE] = 0


class WorkloadRequest(StrictModel):
    """Exactly one of a trace and a synthetic workload."""

    trace: TraceRequest | None = None
    synthetic: Synthetic | None = None

    @model_validator(mode="after")
    def _one_of(self) -> WorkloadRequest:
        if (self.trace is None) == (self.synthetic is None):
            given = "both are given" if self.trace is not None else "neither is given"
            raise ValueError(f"give exactly one of `trace` and `synthetic` ({given})")
        return self


SloBounds: TypeAlias = Annotated[dict[Percentile, Amount], Field(min_length=1)]


class Slo(StrictModel):
    """Upper bounds in seconds on percentiles of TTFT, TPOT and end-to-end latency."""

    ttft_s: SloBounds | None = None
    tpot_s: SloBounds | None = None
    itl_s: SloBounds | None = None
    e2e_s: SloBounds | None = None

    def bounds(self) -> dict[str, dict[str, float]]:
        """{metric: {percentile: seconds}} of the bounds that are set."""
        return self.model_dump(exclude_none=True)


_T = TypeVar("_T")
Choices: TypeAlias = Annotated[tuple[_T, ...], Field(min_length=1)]


class SpaceLimits(StrictModel):
    """Optional limits of the plan space: the values a plan may take."""

    serving: Choices[ServingMode] | None = None
    replicas: Choices[PositiveInt] | None = None
    pools: Choices[str] | None = None
    tensor: Choices[PositiveInt] | None = None
    pipeline: Choices[PositiveInt] | None = None
    expert: Choices[PositiveInt] | None = None
    attention_data: Choices[PositiveInt] | None = None
    context: Choices[PositiveInt] | None = None
    weights: Choices[WeightFormat] | None = None
    activations: Choices[WeightFormat] | None = None
    kv_cache: Choices[KvFormat] | None = None
    max_num_seqs: Choices[PositiveInt] | None = None
    max_num_batched_tokens: Choices[PositiveInt] | None = None
    chunked_prefill: Choices[Flag] | None = None
    cuda_graphs: Choices[Flag] | None = None
    prefix_caching: Choices[Flag] | None = None
    memory_fraction: Choices[Fraction] | None = None
    gpu_clock_hz: Choices[Clock | None] | None = None

    @field_validator("*")
    @classmethod
    def _unique(cls, value: Any) -> Any:
        # A value given twice would make every plan that has it stand twice in the space.
        return tuple(dict.fromkeys(value)) if isinstance(value, tuple) else value


class SearchRequest(StrictModel):
    """How to search, for how long, and the seed of every random choice."""

    method: Method = "auto"
    budget_s: PositiveFloat = 60.0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True), WHOLE] = 0


class Site(StrictModel):
    """What is drawn beside the accelerators, so that energy is that of the meter."""

    #: Power of the whole site over power of its machines (ISO/IEC 30134-2): cooling and conversion.
    pue: Annotated[float, Field(ge=1.0, le=3.0, allow_inf_nan=False, strict=True)] = 1.0
    #: Share of the server's processors, memory, fans and adapters in W per accelerator.
    host_w_per_device: AmountOrZero = 0.0


#: The content of a model's `config.json`. The model is then what it describes, and `model` its name.
ModelConfig = Annotated[dict[str, Any], Field(min_length=1, max_length=2000)]


class PlanningRequest(StrictModel):
    """A model, machines, traffic, targets: what the planner is asked."""

    schema_version: Literal["1"] = "1"
    model: Annotated[str, Field(min_length=1, max_length=4096)]
    config: ModelConfig | None = None
    engine: Engine = Engine()
    cluster: ClusterRequest
    workload: WorkloadRequest
    slo: Slo = Slo()
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("latency", "energy", "memory")
    space: SpaceLimits = SpaceLimits()
    search: SearchRequest = SearchRequest()
    prices: dict[str, AmountOrZero] = Field(default_factory=dict)
    site: Site = Site()

    @field_validator("schema_version", mode="before")
    @classmethod
    def _schema_text(cls, value: Any) -> Any:
        return "1" if value == 1 and not isinstance(value, bool) else value

    @field_validator("objectives")
    @classmethod
    def _unique(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        return tuple(dict.fromkeys(value))

    def to_dict(self) -> dict[str, Any]:
        """The request as plain JSON values, fields that were left out not filled with null."""
        found = self.model_dump(mode="json", exclude_none=True)
        if self.site == Site():
            del found["site"]  # nothing beside the accelerators: nothing to say
        return found


# --- what a plan is ------------------------------------------------------------------------


class Parallelism(StrictModel):
    """Degrees; a worker takes tensor x pipeline x attention_data x context devices."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    attention_data: PositiveInt = 1
    context: PositiveInt = 1

    @property
    def devices(self) -> int:
        """Devices of one worker."""
        return self.tensor * self.pipeline * self.attention_data * self.context


class Quantization(StrictModel):
    """Formats; a field left out takes the checkpoint's own."""

    weights: WeightFormat | None = None
    activations: WeightFormat | None = None
    kv_cache: KvFormat | None = None


class Batching(StrictModel):
    """Iteration-level batching; a field left out takes the engine's default on the device."""

    policy: Literal["continuous"] = "continuous"
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    chunked_prefill: Flag | None = None
    cuda_graphs: Flag | None = None


class Speculative(StrictModel):
    """Speculative decoding."""

    method: Literal["eagle", "mtp", "ngram", "draft_model"]
    draft_tokens: PositiveInt = 3
    acceptance: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] = 0.7


class KvOffload(StrictModel):
    """KV blocks that leave the device."""

    target: Literal["cpu", "disk"]
    bytes: Annotated[int, Field(ge=1, le=2**60, strict=True), WHOLE]


class Worker(StrictModel):
    """One copy of the model and how it batches."""

    pool: str | None = None
    parallelism: Parallelism = Parallelism()
    quantization: Quantization = Quantization()
    batching: Batching = Batching()
    memory_fraction: Fraction | None = None
    prefix_caching: Flag | None = None
    gpu_clock_hz: Clock | None = None
    speculative: Speculative | None = None
    kv_offload: KvOffload | None = None


class WorkerPool(StrictModel):
    """Replicas of one worker in a disaggregated plan."""

    replicas: PositiveInt = 1
    worker: Worker


class Plan(StrictModel):
    """A way of serving: workers, their parallelism, formats and batching."""

    serving: ServingMode = "aggregated"
    replicas: PositiveInt = 1
    worker: Worker | None = None
    prefill: WorkerPool | None = None
    decode: WorkerPool | None = None

    @model_validator(mode="after")
    def _shape(self) -> Plan:
        if self.serving == "aggregated" and (self.worker is None or self.prefill or self.decode):
            raise ValueError("an aggregated plan has `replicas` and `worker`, and no `prefill` or `decode`")
        if self.serving == "disaggregated" and (self.worker or not self.prefill or not self.decode):
            raise ValueError("a disaggregated plan has `prefill` and `decode`, and no `worker`")
        return self


# --- reading, with errors in words -----------------------------------------------------------


class RequestError(InputError):
    """Several problems of one document; the first is the message, all are in `problems`."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        path, message = problems[0]
        more = len(problems) - 1
        super().__init__(path, message, f"and {more} more problem{'s' * (more > 1)}" if more else "")


_TYPE_WORDS = {
    "missing": "this field is required",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping of fields",
    "model_type": "must be a mapping of fields",
    "model_attributes_type": "must be a mapping of fields",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _path(loc: tuple[int | str, ...], prefix: str) -> str:
    text = prefix
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":
            text += f".{part}" if text else str(part)
    return text


#: Models inside models, below a request.
_DEEPEST = 8
_SHORT = reprlib.Repr()
_SHORT.maxlevel = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4


def _show(value: Any) -> str:
    try:
        # Of a bounded size: the value is anybody's, and may be of any.
        text = repr(value) if isinstance(value, (str, int, float)) else _SHORT.repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, nesting without end
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _known_fields(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names beside the place an unknown one stood in, to suggest the nearest."""
    current: Any = model
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(str(part))
        if field is None:
            return []
        current = _model_in(field.annotation)
    return list(getattr(current, "model_fields", {}))


def _place_of(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Where the field stands whose name was given elsewhere, as near to that as it can be; "" nowhere."""
    given = tuple(str(part) for part in loc[:-1] if not isinstance(part, int))
    found: list[tuple[str, ...]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), model)]
    while waiting:
        above, current = waiting.pop()
        for name, field in getattr(current, "model_fields", {}).items():
            path = (*above, name)
            if name == loc[-1]:
                found.append(path)
            inner = _model_in(field.annotation)
            if inner is not None and len(path) < _DEEPEST:
                waiting.append((path, inner))

    def apart(path: tuple[str, ...]) -> tuple[int, int, tuple[str, ...]]:
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(given, path[:-1], strict=False))
        shared = sum(1 for _ in alike)
        return len(given) - shared, len(path) - shared, path

    nearest: tuple[str, ...] = min(found, key=apart, default=())
    return ".".join(nearest)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        found = _model_in(part)
        if found is not None:
            return found
    return None


def sentence(error: Mapping[str, Any], model: type[BaseModel] = BaseModel) -> str:
    """One of pydantic's errors in words; `model` is where the names of its fields are looked up."""
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        near = difflib.get_close_matches(name, _known_fields(model, error["loc"]), 1)
        if near:
            return f"unknown field {name!r}, did you mean {near[0]!r}?"
        place = _place_of(model, error["loc"])
        return f"unknown field {name!r}" + (f", did you mean {place}?" if place else "")
    if kind in ("literal_error", "enum"):
        text = str(value)
        options = [part.strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(text, options, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return f"must be one of {', '.join(options)}, not {_show(value)}{hint}"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least"),
                 "less_than": ("lt", "less than"), "less_than_equal": ("le", "at most")}  # fmt: skip
        key, word = words[kind]
        return f"must be {word} {context[key]:.12g}, not {_show(value)}"
    if kind in _TYPE_WORDS:
        words_ = _TYPE_WORDS[kind]
        return words_ if kind == "missing" else f"{words_}, not {_show(value)}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, not {_show(value)}"


def input_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> RequestError:
    """A pydantic failure as an `InputError` with the path and one sentence per problem."""
    items = error.errors(include_url=False)
    # A list whose members are wrong is also called too short: its members' problems say it all.
    parents = {item["loc"][:length] for item in items for length in range(len(item["loc"]))}
    problems = [
        (_path(item["loc"], prefix), sentence(item, model))
        for item in items
        if item["type"] != "too_short" or item["loc"] not in parents
    ]
    return RequestError(problems or [(prefix, "is not valid")])


def parse_request(data: Any) -> PlanningRequest:
    """A validated request from plain data (a YAML or JSON document). Raises `InputError`."""
    if isinstance(data, PlanningRequest):
        return data
    if not isinstance(data, Mapping):
        raise InputError("", f"a planning request is a mapping of fields, not {_show(data)}")
    try:
        return PlanningRequest.model_validate(dict(data))
    except ValidationError as error:
        raise input_error(error, PlanningRequest) from None


def parse_plan(data: Any, path: str = "plan") -> Plan:
    """A validated plan from plain data. Raises `InputError`."""
    if isinstance(data, Plan):
        return data
    if not isinstance(data, Mapping):
        raise InputError(path, f"a plan is a mapping of fields, not {_show(data)}")
    try:
        return Plan.model_validate(dict(data))
    except ValidationError as error:
        raise input_error(error, Plan, path) from None
