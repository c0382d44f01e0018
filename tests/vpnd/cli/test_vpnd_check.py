"""`vpnd check`, as a process and in process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vpnd.cli.daemon import main, parser

ROOT = Path(__file__).resolve().parents[3]


def test_a_good_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    file.write_text("connections { gw { children { a {}\n b {} } } }\nsecrets { ike { secret = x } }")
    assert main(["check", str(file)]) == 0
    counted = "1 connection, 2 children, 1 shared secret, 0 private keys, 0 certificates, 0 authorities, kernel userspace"
    assert capsys.readouterr().out == f"{file}: ok, {counted}\n"


def test_complaints_come_with_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    file.write_text("connections { gw {\n  mediation = yes\n  children { net {\n esp_proposals = aes128ccm16 } }\n} }\n")
    assert main(["check", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}:2:3: connections.gw.mediation: the option 'mediation' (yes) is not implemented yet\n"
    file.write_text("a {")
    assert main(["check", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}:1:1: section 'a' is not closed\n"


def test_what_the_kernel_cannot_do_is_a_complaint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    file.write_text("vpnd {\n kernel = pfkey\n}\nconnections { gw { children { net {\n esp_proposals = aes128gcm16 } } } }\n")
    assert main(["check", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{file}:5:18: connections.gw.children.net.esp_proposals: the kernel 'pfkey' can do nothing of the proposal")


def test_a_choice_that_a_kernel_leaves_nobody_is_a_complaint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    text = "vpnd {\n kernel = pfkey\n}\nconnections { gw { children { net {\n esp_proposals = aes128-sha1\n copy_dscp = yes } } } }\n"
    file.write_text(text)
    assert main(["check", str(file)]) == 1
    assert capsys.readouterr().err.startswith(f"{file}:6:14: connections.gw.children.net.copy_dscp: the kernel 'pfkey' copies what it copies")
    file.write_text(text.replace("copy_dscp = yes", "copy_dscp = out"))
    assert main(["check", str(file)]) == 0


@pytest.mark.parametrize("option", ["mark_in = %unique", "mark_out = %unique-dir/0xff", "if_id_out = %unique"])
def test_numbers_that_are_given_need_a_kernel_that_has_such(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    for kernel, status in (("userspace", 1), ("pfkey", 1), ("xfrm", 0)):
        file.write_text(f"vpnd {{\n kernel = {kernel}\n}}\nconnections {{ gw {{ children {{ net {{\n esp_proposals = aes128-sha1\n {option} }} }} }} }}\n")
        assert main(["check", str(file)]) == status
        name, what = option.split(" ")[0], "interface ids" if option.startswith("if_id") else "marks"
        told = f"connections.gw.children.net.{name}: the kernel '{kernel}' has no {what} in its policies and SAs"
        assert (told in capsys.readouterr().err) == bool(status)


def test_warnings_are_no_complaints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    file.write_text("unused { a = b }")
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().err == f"{file}:1:1: unused: nothing refers to this section (warning)\n"


def test_it_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "vpnd.cli.daemon", "check", "/no/such/file"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "cannot read /no/such/file: No such file or directory\n"


@pytest.mark.parametrize("arguments", [[], ["check", "a", "b"], ["unknown"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--print-completion", shell])
    assert caught.value.code == 0
    assert "check" in capsys.readouterr().out


@pytest.mark.parametrize("addresses", ["%any", "192.0.2.0/24, 198.51.100.1-198.51.100.9", "0.0.0.0"])
@pytest.mark.parametrize("action", ["trap", "start"])
def test_whoever_is_to_be_asked_has_an_address(addresses: str, action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    text = f"connections {{ gw {{ remote_addrs = {addresses}\n children {{ net {{\n start_action = {action} }} }} }} }}\n"
    file.write_text(text)
    assert main(["check", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{file}:3:17: connections.gw.children.net.start_action: remote_addrs of the connection names no peer to ask")
    file.write_text(text.replace(addresses, f"{addresses}, peer.example"))
    assert main(["check", str(file)]) == 0


def test_a_secret_that_cannot_be_read_is_one_complaint_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vpnd.conf"
    file.write_text("secrets { ike { secret = 0xhush } }")
    assert main(["check", str(file)]) == 1
    assert capsys.readouterr().err == f"{file}:1:26: secrets.ike.secret: hex digits were expected after '0x'\n"
