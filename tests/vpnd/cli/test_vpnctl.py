"""`vpnctl` against the control server with a fake daemon behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from control_fakes import ServedBackend, child_status, ike_status, selector

from vpnd.cli.control import EXIT_FAILED, EXIT_OK, EXIT_UNAVAILABLE, main, parser
from vpnd.config.tree import Section
from vpnd.config.validate import validate_connection
from vpnd.control.backend import PolicyStatus
from vpnd.ike.identity import Identity

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedBackend]:
    daemon = ServedBackend(tmp_path / "vici.sock")
    message = {"remote_addrs": ["192.0.2.2"], "local": {"auth": "psk"}, "remote": {"auth": "psk", "id": "sun"}}
    children = {"net": {"remote_ts": ["10.2.0.0/16"]}, "other": {"mode": "transport"}}
    daemon.backend.conns["gw"] = validate_connection(Section.of({"gw": {**message, "children": children}}))
    yield daemon
    daemon.stop()


@pytest.fixture
def vpnctl(served: ServedBackend, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["--socket", str(served.path), *arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def as_json(vpnctl: Run, *arguments: str) -> Any:
    status, output, _ = vpnctl("--json", *arguments)
    assert status == EXIT_OK
    return json.loads(output)


def test_status(served: ServedBackend, vpnctl: Run) -> None:
    served.backend.sas.append(ike_status())
    report = as_json(vpnctl, "status")
    assert report["daemon"]["daemon"] == "vpnd"
    assert report["ikesas"] == {"total": 1, "half-open": 1}
    assert (report["connections"], report["children"], report["policies"]) == (1, {"total": 2, "up": 1}, 0)
    assert report["counters"] == {"ike.sent": 5}
    status, output, _ = vpnctl("status")
    assert status == EXIT_OK
    assert "1 of 2 up, in 1 connection" in output


def test_sas(served: ServedBackend, vpnctl: Run) -> None:
    assert as_json(vpnctl, "sas") == []
    assert vpnctl("sas")[1] == "no SAs\n"
    served.backend.sas += [ike_status(), ike_status("other", 5, children=[])]
    first, second = as_json(vpnctl, "sas")
    assert (first["name"], first["uniqueid"], first["state"], second["name"], second["child-sas"]) == ("gw", "4", "ESTABLISHED", "other", [])
    assert first["child-sas"][0]["spi-in"] == "c1234567"
    assert first["child-sas"][0]["local-ts"] == ["10.1.0.0/16"]
    assert [sa["name"] for sa in as_json(vpnctl, "sas", "--ike", "other")] == ["other"]
    _, output, _ = vpnctl("sas")
    for text in ("gw #4", "net #7", "AES_GCM_16-128 in UDP", "840 B, 10 packets", "192.0.2.2[4500]", "3600 s"):
        assert text in output


def test_children_in_several_events_are_one_ike_sa(served: ServedBackend, vpnctl: Run) -> None:
    served.backend.sas.append(ike_status(children=[child_status(f"child-with-a-long-name-{number:05}", number) for number in range(2000)]))
    (sa,) = as_json(vpnctl, "sas")
    assert len(sa["child-sas"]) == 2000


def test_conns(served: ServedBackend, vpnctl: Run) -> None:
    served.backend.sas.append(ike_status())
    served.backend.policies.append(PolicyStatus("other", "gw", "TRANSPORT", [selector("10.1.0.0/16")], [selector("10.2.0.0/16")]))
    (connection,) = as_json(vpnctl, "conns")
    assert [(child["name"], child["up"], child["trapped"]) for child in connection["children"]] == [("net", True, False), ("other", False, True)]
    _, output, _ = vpnctl("conns")
    for text in ("gw", "net", "up", "trapped", "sun (pre-shared key)", "10.2.0.0/16", "dynamic"):
        assert text in output
    assert as_json(vpnctl, "conns", "--ike", "none") == []


def test_policies(served: ServedBackend, vpnctl: Run) -> None:
    assert vpnctl("policies")[1] == "no policies\n"
    for name, mode in (("a", "TUNNEL"), ("b", "PASS"), ("c", "DROP")):
        served.backend.policies.append(PolicyStatus(name, "gw", mode, [selector("10.1.0.0/16")], [selector("10.2.0.0/16")]))
    assert [(policy["child"], policy["mode"]) for policy in as_json(vpnctl, "policies")] == [("a", "TUNNEL"), ("b", "PASS"), ("c", "DROP")]
    assert "10.2.0.0/16" in vpnctl("policies")[1]


def test_up_and_down(served: ServedBackend, vpnctl: Run) -> None:
    status, output, progress = vpnctl("up", "net", "--timeout", "2.5", "--ike", "gw")
    assert (status, output, progress) == (EXIT_OK, "net: up\n", "[IKE] initiating net\n")
    assert as_json(vpnctl, "down", "net") == {"success": True, "child": "net"}
    assert served.backend.called == ["initiate net gw 2.5", "terminate net None None None False 0"]
    status, output, errors = vpnctl("up", "bad")
    assert (status, output, errors.splitlines()[-1]) == (EXIT_FAILED, "", "vpnctl: establishing CHILD_SA 'bad' failed")
    status, output, errors = vpnctl("--json", "down", "net")
    assert (status, json.loads(output), errors) == (EXIT_FAILED, {"success": False, "error": "no matching SAs to terminate found"}, "")


def test_wait(served: ServedBackend, vpnctl: Run) -> None:
    assert vpnctl("wait", "net", "--timeout", "1") == (EXIT_OK, "net: up\n", "")
    assert vpnctl("wait", "bad")[0] == EXIT_FAILED
    assert served.backend.called == ["wait net 1", "wait bad 0"]


def test_text_of_a_peer_is_no_markup_and_no_escape_sequence(served: ServedBackend, vpnctl: Run) -> None:
    peer = Identity(11, b"[red]\x1b[2Jx")
    served.backend.sas.append(replace(ike_status(), name="[bold]gw[/bold]", remote_id=peer))
    _, output, _ = vpnctl("sas")
    assert "[bold]gw[/bold]" in output
    assert "\x1b" not in output


def test_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(tmp_path / "none.sock"), "status"]) == EXIT_UNAVAILABLE
    assert capsys.readouterr().err == f"vpnctl: no daemon listens on {tmp_path / 'none.sock'}: is vpnd running?\n"
    assert main(["--socket", str(tmp_path / "none.sock"), "--json", "sas"]) == EXIT_UNAVAILABLE
    assert json.loads(capsys.readouterr().out)["success"] is False


@pytest.mark.parametrize("arguments", [[], ["up"], ["sas", "x"], ["status", "--timeout", "0"], ["status", "--timeout", "nan"], ["status", "--timeout", "x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2


def test_options_before_and_after_the_command() -> None:
    before = parser().parse_args(["--json", "--socket", "/a", "--timeout", "3", "sas"])
    after = parser().parse_args(["sas", "--json", "--socket", "/a", "--timeout", "3"])
    assert vars(before) == vars(after)


def test_completion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--print-completion", "bash"])
    assert "policies" in capsys.readouterr().out


def test_redirect(served: ServedBackend, vpnctl: Run) -> None:
    served.backend.sas.append(ike_status())
    assert vpnctl("redirect", "203.0.113.9")[1] == "1 redirected to 203.0.113.9\n"
    assert vpnctl("redirect", "gateway.example", "--ike", "gw", "--peer-ip", "192.0.2.0/24", "--peer-id", "*.example")[0] == 0
    assert served.backend.called[-2:] == ["redirect 203.0.113.9 None None None %any", "redirect gateway.example gw None 192.0.2.0/24 *.example"]
    status, _, complaint = vpnctl("redirect", "224.0.0.1")
    assert status == 1
    assert "not the address of a host" in complaint


def test_labels_and_traces(served: ServedBackend, vpnctl: Run) -> None:
    status, out, _ = vpnctl("mpls", "lfib", "red")
    assert status == EXIT_OK
    assert "out of VRF red" in out
    assert "10.0.0.0/25" in out
    assert served.backend.called == ["lfib red"]
    _, out, _ = vpnctl("--json", "mpls", "lfib")
    assert [row.get("label") for row in json.loads(out)] == ["100", None]
    assert vpnctl("mpls", "vrfs")[0] == EXIT_FAILED
    _, out, _ = vpnctl("--json", "mpls", "trace", "red", "10.0.0.9")
    assert json.loads(out)[-1] == {"at": "result", "found": "dropped: mpls no route"}
    _, out, _ = vpnctl("mpls", "trace", "--peer", "pe", "--label", "100,7", "--to", "10.0.0.1")
    assert "pe [100, 7] 10.0.0.1" in out
    for wrong in (("red",), ("--peer", "pe"), ("red", "10.0.0.9", "--peer", "pe")):
        assert vpnctl("mpls", "trace", *wrong)[0] == 2
    for wrong in (("red", "nowhere"), ("--peer", "pe", "--label", "x"), ("--peer", "pe", "--label", "1048576")):
        assert vpnctl("mpls", "trace", *wrong)[0] == EXIT_FAILED
