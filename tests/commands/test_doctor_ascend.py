"""The doctor on machines with cards: tools that print what Huawei's documentation shows, and tools that do not."""

import json

import pytest

from lora_ms.recipes import doctor, doctor_ascend
from lora_ms.recipes.doctor import OK, WARNING

TABLE_OF_TWO = """
+------------------------------------------------------------------------------------------------+
| npu-smi 23.0.rc2                 Version: 23.0.rc2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 90.5        38                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          4156 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | {health}            | 91.0        39                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          4156 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 4711          | python                   | 12345                   |
+===========================+===============+====================================================+
| No running processes found in NPU 1                                                            |
+===========================+===============+====================================================+
"""
HCCN = """#!/bin/sh
case $3 in
    -link) echo "link status: {link}" ;;
    -ip) echo "ipaddr:192.168.100.10{address}"; echo "netmask:255.255.255.0" ;;
    -net_health) echo "net health status: {health}" ;;
    -tls) echo "dev_id:$2, tls switch[{tls}](0:disable, 1:enable), tls preconfigured[1](0:non-preset, 1:preset)" ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine(…)``: the lines of a machine with two cards and such tools."""
    tools = tmp_path / "driver/tools"
    tools.mkdir(parents=True)
    (tmp_path / "driver/version.info").write_text("Version=24.1.rc2\nascendhal_version=7.35.19\n")
    cann = tmp_path / "cann"
    cann.mkdir()
    (cann / "version.cfg").write_text("# version: 1.0\nruntime_running_version=[7.5.0.1.129:8.0.RC3]\n")
    (tmp_path / "davinci0").touch()
    (tmp_path / "davinci1").touch()
    for name in ("RANK_TABLE_FILE", "HCCL_CONNECT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(cann))
    monkeypatch.setattr(doctor_ascend.shutil, "which", lambda name: None)

    def lines(smi=None, link="UP", address="$2", health="Success", tls="0"):
        if smi is not None:
            (tools / "npu-smi").write_text(f"#!/bin/sh\ncat <<'X'\n{TABLE_OF_TWO.format(health=smi)}\nX\n")
            (tools / "hccn_tool").write_text(HCCN.format(link=link, address=address, health=health, tls=tls))
            for file in tools.iterdir():
                file.chmod(0o755)
        return list(doctor.ascend_findings(tmp_path, tmp_path))

    return lines


def of(found, name):
    return [(each.status, each.text) for each in found if each.name == name]


def test_all_is_well(machine):
    found = machine(smi="OK")
    assert [each.status for each in found] == [OK] * 3
    assert of(found, "driver")[0][1].startswith("driver 24.1.rc2, CANN 8.0.RC3")
    assert of(found, "npu-smi") == [(OK, "2 cards of type 910B3, all healthy")]
    assert of(found, "network") == [(OK, "links are up, each card has an address")]


def test_a_tool_that_is_absent_is_a_line(machine):
    found = machine()
    assert of(found, "npu-smi")[0][0] == of(found, "hccn_tool")[0][0] == WARNING
    assert "not found" in of(found, "npu-smi")[0][1] and "not checked" in of(found, "hccn_tool")[0][1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"smi": "Alarm"}, "card 1: Alarm"),
        ({"smi": "OK", "link": "DOWN"}, "card 0: link DOWN"),
        ({"smi": "OK", "address": "7"}, "192.168.100.107 is on two cards"),
        ({"smi": "OK", "health": "Receive timeout"}, "card 0: network Receive"),
        ({"smi": "OK", "tls": "$2"}, "TLS differs between cards"),
    ],
)
def test_what_is_wrong_is_named(machine, given, words):
    found = machine(**given)
    assert [each for each in found if each.status == WARNING and words in each.text], found


def test_no_card_and_no_line(tmp_path):
    assert list(doctor.ascend_findings(tmp_path, tmp_path)) == []


def test_rank_tables(tmp_path, monkeypatch, machine):
    device = [{"device_id": str(i), "device_ip": f"192.168.100.10{i}", "rank_id": str(i)} for i in range(2)]
    table = {"version": "1.0", "server_count": "1", "server_list": [{"server_id": "10.0.0.1", "device": device}]}
    file = tmp_path / "rank_table.json"
    monkeypatch.setenv("RANK_TABLE_FILE", str(file))
    assert "cannot be read" in of(machine(smi="OK"), "rank table")[0][1]
    file.write_text(json.dumps(table))
    assert of(machine(), "rank table")[0][0] == OK
    device[1] |= {"rank_id": "3", "device_ip": device[0]["device_ip"]}
    file.write_text(json.dumps(table))
    (status, text) = of(machine(), "rank table")[0]
    assert status == WARNING and "not 0 to 1" in text and "device_ip stands twice" in text
    file.write_text("[]")
    assert "is no rank table" in of(machine(), "rank table")[0][1]
