"""A plan that somebody gives: its values that were left out, and what makes it impossible.

Whether it fits into memory, or can serve a workload, the evaluator says.
"""

from __future__ import annotations

from dataclasses import dataclass

from hardware import Cluster, InputError
from planner.engines import EngineProfile
from planner.models import ModelSpec, check_degrees
from planner.plans import (
    PlanPoint,
    check_clock,
    check_formats,
    default_formats,
    default_seqs,
    natural_activations,
)
from planner.request import Plan, Worker


def resolve_plan(
    plan: Plan, spec: ModelSpec, cluster: Cluster, engine: EngineProfile, path: str = "plan"
) -> PlanPoint:
    """An aggregated plan, every value stated (see `resolve_worker`, and `planner.pairs` for other plans)."""
    if plan.worker is None:
        raise InputError(f"{path}.serving", "an aggregated plan is needed here")
    return resolve_worker(plan.worker, plan.replicas, spec, cluster, engine, f"{path}.worker")


def resolve_worker(
    worker: Worker,
    replicas: int,
    spec: ModelSpec,
    cluster: Cluster,
    engine: EngineProfile,
    path: str = "plan.worker",
) -> PlanPoint:
    """Replicas of a worker with every field that was left out set to the engine's or checkpoint's default.

    Raises InputError when the worker names a pool that does not exist or asks for something this
    version does not model; whether the pool can hold it is `check_plan`'s question.
    """
    if worker.speculative is not None:
        raise InputError(f"{path}.speculative", "speculative decoding is not modelled in this version")
    if worker.kv_offload is not None:
        raise InputError(f"{path}.kv_offload", "KV offload is not modelled in this version")
    degrees = worker.parallelism
    if degrees.context != 1:
        raise InputError(f"{path}.parallelism.context", "context parallelism is not modelled in this version")
    names = [pool.name for pool in cluster.pools]
    name = worker.pool or names[0]
    if name not in names:
        raise InputError(f"{path}.pool", f"no pool is named {name!r}, pools are {', '.join(names)}")
    pool = cluster.pool(name)
    device, tier = pool.device, engine.tier(pool.device)
    own_weights, own_activations, own_kv = default_formats(spec, device)
    weights = worker.quantization.weights or own_weights
    activations = worker.quantization.activations or (
        own_activations if weights == own_weights else natural_activations(device, weights)
    )
    batching = worker.batching
    budget = batching.max_num_batched_tokens or tier.max_num_batched_tokens
    return PlanPoint(
        pool=name,
        replicas=replicas,
        tensor=degrees.tensor,
        pipeline=degrees.pipeline,
        expert=degrees.expert,
        attention_data=degrees.attention_data,
        weights=weights,
        activations=activations,
        kv_cache=worker.quantization.kv_cache or own_kv,
        max_num_seqs=batching.max_num_seqs or default_seqs(engine, tier.max_num_seqs, budget),
        max_num_batched_tokens=budget,
        chunked_prefill=engine.chunked_prefill
        if batching.chunked_prefill is None
        else batching.chunked_prefill,
        cuda_graphs=engine.cuda_graphs if batching.cuda_graphs is None else batching.cuda_graphs,
        memory_fraction=worker.memory_fraction
        or engine.memory_fraction(
            device,
            tensor=degrees.tensor,
            pipeline=degrees.pipeline,
            attention_data=degrees.attention_data,
            token_budget=budget,
        ),
        prefix_caching=engine.prefix_caching if worker.prefix_caching is None else worker.prefix_caching,
        gpu_clock_hz=worker.gpu_clock_hz,
    )


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """Why a plan cannot be built at all, and the field (below the plan) that says so."""

    field: str
    reason: str


def check_plan(point: PlanPoint, spec: ModelSpec, cluster: Cluster) -> PlanProblem | None:
    """What makes a plan impossible on the cluster, before any memory is counted; or None."""
    pool = cluster.pool(point.pool)
    total = pool.nodes * pool.devices_per_node
    if point.devices > total:
        return PlanProblem(
            "replicas" if point.worker_devices <= total else "worker.parallelism",
            f"the plan takes {point.devices} devices, pool {pool.name!r} has {total}",
        )
    reason = check_degrees(spec, point.degrees)
    if reason:
        return PlanProblem("worker.parallelism", reason)
    reason = check_formats(pool.device, point.weights, point.activations, point.kv_cache)
    if reason:
        return PlanProblem("worker.quantization", reason)
    reason = check_clock(pool.device, point.gpu_clock_hz)
    if reason:
        return PlanProblem("worker.gpu_clock_hz", reason)
    return None
