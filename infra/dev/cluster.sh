#!/usr/bin/env bash
# Runs a Ray cluster of two nodes on this machine until Ctrl-C: `make cluster`. Optional variables: NODES, CPUS (per
# node), PORT and DASHBOARD_PORT. Uses Python, since `ray start` binds a second node to an address reachable by others.
set -euo pipefail
port=${PORT:-6379} dashboard=${DASHBOARD_PORT:-8265}

for taken in "PORT=$port" "DASHBOARD_PORT=$dashboard"; do
    if (exec 3<> "/dev/tcp/127.0.0.1/${taken#*=}") 2> /dev/null; then
        echo "cluster: port ${taken#*=} is taken: set ${taken%=*} to another port" >&2
        exit 1
    fi
done

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0  # loopback only
loopback=lo
[[ $(uname) != Darwin ]] || loopback=lo0
export GLOO_SOCKET_IFNAME=$loopback NCCL_SOCKET_IFNAME=$loopback  # for communication between training workers
export RAY_TMPDIR=${RAY_TMPDIR:-/tmp/ray-cluster}  # not /tmp/ray: other Ray processes would join this cluster
mkdir -p "$RAY_TMPDIR"
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

exec python - "$port" "$dashboard" "${CPUS:-2}" "${NODES:-2}" << 'EOF'
import os
import signal
import sys
import threading
import time
from http.client import HTTPException
from urllib.request import ProxyHandler, Request, build_opener

from ray.cluster_utils import Cluster

port, dashboard, cpus, nodes = map(int, sys.argv[1:])
ended = threading.Event()
node = {"num_cpus": cpus, "object_store_memory": 200_000_000}
head = {**node, "gcs_server_port": port, "include_dashboard": True, "dashboard_port": dashboard}
cluster = Cluster()


def wait_for_dashboard():
    """It accepts connections before it can answer."""
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    jobs = Request(f"http://127.0.0.1:{dashboard}/api/jobs/", headers=token)
    direct, deadline = build_opener(ProxyHandler({})), time.monotonic() + 120
    while True:
        try:
            direct.open(jobs, timeout=10).close()
            return
        except (OSError, HTTPException) as error:
            if time.monotonic() > deadline:
                sys.exit(f"cluster: the dashboard does not answer: {error}")
            time.sleep(0.2)


try:
    cluster.add_node(**head)
    for number in range(1, nodes):  # a starting raylet empties its folder of job code, so each node needs its own
        cluster.add_node(**node, runtime_env_dir_name=f"runtime_resources_{number}")
    wait_for_dashboard()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    print(f"export RAY_ADDRESS={cluster.address}", *(f"{name}={os.environ[name]}" for name in names))
    print(f"# Submit jobs to http://127.0.0.1:{dashboard}. Ctrl-C stops the cluster.", flush=True)
    while not ended.wait(1.0):
        if dead := [name for each in cluster.list_all_nodes() for name, _ in each.dead_processes()]:
            sys.exit(f"cluster: {', '.join(dead)} ended: the logs in {cluster.head_node.get_logs_dir_path()} say why")
finally:
    cluster.shutdown()
EOF
