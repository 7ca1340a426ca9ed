"""A plan as Kubernetes manifests: workers and their service, or both kinds of workers and a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.exports.launch import Files, Launch, image_of, node_options, option_table, quoted, to_yaml
from planner.exports.roles import Address, Pair, handover_table, router_config, router_notes, router_words

#: What Kubernetes calls the devices of a vendor.
RESOURCES = {
    "nvidia": "nvidia.com/gpu",
    "amd": "amd.com/gpu",
    "intel": "habana.ai/gaudi",
    "google": "google.com/tpu",
}
_SETTINGS = "/etc/planfront"
_POD_ADDRESS = {"fieldRef": {"fieldPath": "status.podIP"}}


def of_worker(launch: Launch) -> Files:
    """Replicas of one worker behind a service."""
    name = launch.label
    labels = {"app.kubernetes.io/name": name}
    documents = _settings(launch, name)
    pod, follower = _pods(launch, name, labels)
    if launch.nodes > 1:
        # It makes a headless service of its name, by which leaders are found: the other one needs its own.
        workload = _groups(launch, f"{name}-group", labels, pod, follower)
    else:
        workload = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {"replicas": launch.replicas, "selector": {"matchLabels": labels}, "template": pod},
        }
    documents += [workload, _service(name, labels)]
    return {"deployment.yaml": to_yaml(documents)}, [*launch.notes, *_notes([launch])]


def of_pair(pair: Pair) -> Files:
    """Both kinds of workers, each pod with a name of its own, and their router behind a service."""
    documents: list[dict[str, Any]] = []
    addresses: dict[str, list[Address]] = {}
    for launch in pair.launches:
        name = f"{pair.label}-{launch.role}"
        labels = {"app.kubernetes.io/name": pair.label, "app.kubernetes.io/component": launch.role}
        pod, follower = _pods(launch, name, labels)
        documents += _settings(launch, name)
        if launch.nodes > 1:
            # It makes the service of its name itself, by which its leaders have names.
            documents.append(_groups(launch, name, labels, pod, follower))
        else:
            documents += _named_pods(launch, name, labels, pod)
        port = option_table(pair.engine)["port"]
        addresses[launch.role] = [
            Address(f"{name}-{replica}.{name}", port, _handover_port(launch))
            for replica in range(launch.replicas)
        ]
    documents += _router(pair, addresses)
    notes = [
        *pair.notes,
        *_notes(pair.launches),
        f"Requests go to the service {pair.label}. Pods need the network over which caches go: give them the "
        "RDMA devices of your cluster, and let each kind of workers choose the nodes of its pool.",
        "The image has to hold nixl." if pair.engine != "trtllm" else "",
        *router_notes(pair),
    ]
    if pair.engine == "vllm":
        notes.append(
            f"Its file goes into a config map: kubectl create configmap {pair.label}-proxy "
            "--from-file=toy_proxy_server.py"
        )
    elif pair.engine == "sglang":
        notes.append("Name an image that has it, where the engine's has not.")
    else:
        notes.append("The router takes no device, but its image may want a node with a driver.")
    return {"deployment.yaml": to_yaml(documents)}, [note for note in notes if note]


def _notes(launches: Sequence[Launch]) -> list[str]:
    notes = ["A gated model needs the secret `hugging-face` with the key `token`."]
    if any(launch.nodes > 1 for launch in launches):
        notes.append(
            "Workers on several nodes need LeaderWorkerSet, and the network of your cluster in the pods."
        )
    if launches[0].vendor != "nvidia":
        notes.append(
            f"The image is built for NVIDIA devices: name one of {launches[0].engine} for this device."
        )
    return notes


def _settings(launch: Launch, name: str) -> list[dict[str, Any]]:
    """The config map of an engine's settings, if it has any."""
    if not launch.config:
        return []
    return [_config_map(name, {launch.config_file: launch.config_text()})]


def _config_map(name: str, data: Mapping[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": dict(data)}


def _service(name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }


def _handover_port(launch: Launch) -> int:
    """Pods have addresses of their own, so one port is enough for all of a kind."""
    port: int = (
        option_table(launch.engine).get("disaggregated", {}).get("handover_port", {}).get(launch.role, 0)
    )
    return port


def _pods(launch: Launch, name: str, labels: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a worker (of its first node), and what follows it on its other nodes."""
    table = option_table(launch.engine)
    arguments = launch.arguments(f"{_SETTINGS}/{launch.config_file}")
    arguments = [*arguments, "--host", "0.0.0.0", "--port", str(table["port"])]
    arguments = [str(_handover_port(launch)) if word == "{handover_port}" else word for word in arguments]
    spread = node_options(launch, "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS")
    if spread:
        words = [quoted(word, {"head": "$LWS_LEADER_ADDRESS"}) for word in arguments]
        arguments = ["bash", "-c", " ".join(["exec", *words, *spread])]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]
    if launch.config:
        mounts.append({"name": "config", "mountPath": _SETTINGS})
        volumes.append({"name": "config", "configMap": {"name": name}})
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10}
    container = {
        "name": "engine",
        "image": image_of(table, launch.version),
        "command": arguments[:1],
        "args": arguments[1:],
        "ports": [{"name": "http", "containerPort": table["port"]}],
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token", "optional": True}},
            },
            *_environment(launch),
        ],
        "resources": {"limits": {RESOURCES[launch.vendor]: launch.devices // launch.nodes}},
        "startupProbe": {**probe, "failureThreshold": 180},
        "readinessProbe": probe,
        "volumeMounts": mounts,
    }
    annotations = {f"planfront/{f.name.lstrip('-').partition('=')[0]}": f.source for f in launch.flags}
    pod = {
        "metadata": {"labels": labels, "annotations": annotations},
        "spec": {"containers": [container], "volumes": volumes},
    }
    # Requests go to the leaders alone, and nobody else answers a probe.
    probed = ("ports", "startupProbe", "readinessProbe")
    follower = {key: value for key, value in container.items() if key not in probed}
    return pod, {
        "metadata": {"annotations": annotations},
        "spec": {"containers": [follower], "volumes": volumes},
    }


def _environment(launch: Launch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, value in launch.environment.items():
        if value == "{address}":
            found.append({"name": name, "valueFrom": _POD_ADDRESS})
        else:
            port = str(_handover_port(launch))
            found.append({"name": name, "value": port if value == "{handover_port}" else value})
    return found


def _groups(
    launch: Launch,
    name: str,
    labels: Mapping[str, str],
    leader: Mapping[str, Any],
    follower: Mapping[str, Any],
) -> dict[str, Any]:
    """Workers of several nodes."""
    group = {
        "size": launch.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": leader,
        "workerTemplate": follower,
    }
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {"replicas": launch.replicas, "leaderWorkerTemplate": group},
    }


def _named_pods(
    launch: Launch, name: str, labels: Mapping[str, str], pod: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Workers of one node each, with names under a service that has no address of its own."""
    service = _service(name, labels)
    # Routers look for workers from their own start on, and ask them whether they are ready.
    service["spec"] = {"clusterIP": "None", "publishNotReadyAddresses": True, **service["spec"]}
    workload = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "serviceName": name,
            "replicas": launch.replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": pod,
        },
    }
    return [workload, service]


def _router(pair: Pair, addresses: Mapping[str, Sequence[Address]]) -> list[dict[str, Any]]:
    table = handover_table(pair.engine)["router"]
    labels = {"app.kubernetes.io/name": pair.label, "app.kubernetes.io/component": "router"}
    name, settings = f"{pair.label}-router", ""
    documents: list[dict[str, Any]] = []
    config = router_config(pair.engine, addresses)
    if config:
        documents.append(_config_map(name, {"router.yaml": to_yaml([config])}))
        words, settings = [*table["command"], f"{_SETTINGS}/router.yaml"], name
    else:
        words = [word for line in router_words(pair.engine, addresses) for word in line]
    if pair.engine == "vllm":
        words = [f"{_SETTINGS}/{word}" if word == "toy_proxy_server.py" else word for word in words]
        settings = f"{pair.label}-proxy"
    container: dict[str, Any] = {
        "name": "router",
        "image": image_of(option_table(pair.engine), pair.prefill.version),
        "command": words[:1],
        "args": words[1:],
        "ports": [{"name": "http", "containerPort": table["port"]}],
        "readinessProbe": {"httpGet": {"path": table["health"], "port": "http"}, "periodSeconds": 10},
    }
    pod: dict[str, Any] = {"containers": [container]}
    if settings:
        container["volumeMounts"] = [{"name": "config", "mountPath": _SETTINGS}]
        pod["volumes"] = [{"name": "config", "configMap": {"name": settings}}]
    workload = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = _service(name, labels)
    service["metadata"] = {**service["metadata"], "name": pair.label}
    return [*documents, workload, service]
