"""The dataset worker's admission: it leaves room in Redis for what is in flight, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_config, publish_policy
from harness import tiny_folder

from sluice.common.connections.broker import make_app
from sluice.common.connections.client import connect
from sluice.common.ledger.ledger import read_counters
from sluice.common.models.assets import read_assets
from sluice.common.run import create_run
from sluice.scripts.launcher.redis_server import start_server
from sluice.workers.context import Context
from sluice.workers.dataset import DatasetRole


def test_admission_pauses_while_redis_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_folder(3)
    server = start_server(tmp_path / "redis")
    client = connect(server.url)
    monkeypatch.setenv("SLUICE_REDIS_URL", server.url)
    monkeypatch.setenv("SLUICE_RUN", "full")
    config = make_config(
        model={"path": str(tiny / "model")},
        dataset={"path": str(tiny / "train.jsonl"), "max_req_tokens": 32},
        trainer={"seq_len": 64},
    )
    assets = read_assets(str(tiny / "model")).to_wire()
    keys = create_run(client, "full", config, assets=assets, folder=str(tmp_path)).keys
    publish_policy(client, keys, 0)
    role = DatasetRole(Context.open(make_app("full", url=server.url), "dataset"))
    try:
        for i in range(40):  # small ones: a large command's own buffer would count for a moment, too
            client.set(f"sluice:filler:{i}", bytes(512 << 10))
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", int(used * 1.05))
        role.fill()
        assert read_counters(client, keys).admitted == 0
        assert role.context.stats()["stopped_by"].startswith(f"redis_memory: {used >> 20} MiB of maxmemory")
        client.config_set("maxmemory", int(used * 1.5))
        role.fill()
        assert read_counters(client, keys).admitted == config.max_credits
        assert role.context.stats()["stopped_by"] == "no_credit"
    finally:
        role.close()
        client.close()
        server.stop()
