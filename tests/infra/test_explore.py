"""scratch"""
from __future__ import annotations
import json, os, shutil, signal, subprocess, sys, tempfile, time, socket, threading
from contextlib import ExitStack
from pathlib import Path
import httpx, pytest
from gateway import write_pool
from serving import serving
from upstream import Upstream
INFRA = Path("/tmp/h/infra/infra")

def free():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def test_explore(tmp_path):
    D=Path('/tmp/rxd'); router=str(D/'router'); small_data=D/'small_data'; tiny_model=D/'tiny_model'
    import ray
    from prefill_serve.haproxy import environment
    ray.shutdown()
    root = tempfile.mkdtemp(prefix="pr-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("RAY_TMPDIR", root); patch.setenv("RAY_metrics_report_interval_ms", "1000")
        dash = free()
        cl = subprocess.Popen([INFRA/"dev"/"cluster.sh"], env={**os.environ, **environment(), "PORT": str(free()), "DASHBOARD_PORT": str(dash), "CPUS": "4"}, stdout=subprocess.PIPE, text=True)
        try:
            line = cl.stdout.readline()
            for part in line.split()[1:]:
                k, v = part.split("=", 1); patch.setenv(k, v)
            cfg = tmp_path/"prom"; cfg.mkdir()
            text = (INFRA/"prometheus/prometheus.yml").read_text().replace("/tmp/ray/", root+"/").replace("15s", "1s")
            (cfg/"prometheus.yml").write_text(text); shutil.copy(INFRA/"prometheus/alerts.yml", cfg)
            port = free()
            pr = subprocess.Popen(["prometheus", f"--config.file={cfg}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb", f"--web.listen-address=127.0.0.1:{port}"], stderr=open("/tmp/prom.err","w"))
            t0=time.time()
            ups = {n: stack.enter_context(Upstream(n, models=(f"{n}-1",))) for n in ("big","small")}
            pool = write_pool(tmp_path/"pool.toml", ups)
            (tmp_path/"b.toml").write_text("usd_per_day = 1.0\n")
            try:
                with serving(router, pool=pool, budgets=tmp_path/"b.toml", threads=1, replicas=2, max_replicas=2) as s:
                    print("serving", time.time()-t0)
                    stop = threading.Event()
                    def ask():
                        with httpx.Client(base_url=s.url, timeout=30) as c:
                            n=0
                            while not stop.is_set():
                                n+=1
                                c.post("/v1/route", json={"prompt": f"what is {n%97} plus"})
                                c.post("/v1/chat/completions", json={"messages":[{"role":"user","content":f"what is {n%50} minus"}]})
                                time.sleep(.2)
                    th=threading.Thread(target=ask); th.start()
                    for cmd in (["extract","--corpus",small_data/"corpus.parquet","--encoder",tiny_model,"--out",tmp_path/"a","--shard-rows","20"],
                                ["train","--activations",tmp_path/"a","--outcomes",small_data/"outcomes.parquet","--pool",small_data/"pool.toml","--out",tmp_path/"r","--seeds","4","--keep","2"]):
                        t=time.time()
                        try:
                            d=subprocess.run([sys.executable,"-m","prefill_jobs",*map(str,cmd)],stdout=open(f"/tmp/{cmd[0]}.log","w"),stderr=subprocess.STDOUT,timeout=70)
                            print(cmd[0], d.returncode, time.time()-t)
                        except subprocess.TimeoutExpired: print("timeout", cmd[0]); os.system("ray status > /tmp/ray.status 2>&1")
                    stop.set(); th.join()
                    r=httpx.get(f"http://127.0.0.1:{port}/api/v1/series", params={"match[]":'{__name__=~"ray_.*|haproxy.*|autoscaler.*"}',"start":t0,"end":time.time()}).json()
                    json.dump(r, open("/tmp/series.json","w"))
                    r=httpx.get(f"http://127.0.0.1:{port}/api/v1/targets").json()
                    json.dump(r, open("/tmp/targets.json","w"))
            finally:
                pr.terminate(); pr.wait()
        finally:
            cl.terminate(); cl.wait(); shutil.rmtree(root, ignore_errors=True)
