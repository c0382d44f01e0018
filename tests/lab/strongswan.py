"""Debian's strongSwan in a namespace, with its userspace ESP (kernel-libipsec): this machine's, or the one of a newer Debian.

charon keeps a pid file below /run, so it gets one of its own (`ip netns exec` has made the mount namespace already).
Copies of the programs run, for Debian's AppArmor profiles bind the installed paths to files below /etc.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import ClassVar, Final

from lab.daemon import READY_SECONDS, ForeignDaemon
from lab.namespaces import Namespace
from lab.process import LabError, wait_until
from lab.root import HOST, NEWER, Root

CHARON: Final = Path("/usr/lib/ipsec/charon")
SWANCTL: Final = Path("/usr/sbin/swanctl")
LIBIPSEC: Final = Path("/usr/lib/ipsec/plugins/libstrongswan-kernel-libipsec.so")
PLUGINS: Final = (
    "random nonce openssl curve25519 chapoly aes sha2 sha1 hmac kdf gcm ccm ctr pem pkcs1 pkcs8 x509 pubkey constraints revocation "
    "kernel-libipsec kernel-netlink socket-default vici updown"
)


def missing(root: Root = HOST) -> str:
    """What this peer needs and is not there; empty when it is complete."""
    return ", ".join(str(path) for path in map(root.file, (CHARON, SWANCTL, LIBIPSEC)) if not path.exists())


class StrongSwan(ForeignDaemon):
    """charon with the configuration at `config`. `settings`: further lines of the charon section of strongswan.conf."""

    kind = "strongSwan"
    log_name = "charon.log"
    root: ClassVar[Root] = HOST

    def __init__(self, namespace: Namespace, config: Path, settings: str = "") -> None:
        super().__init__(namespace, config)
        self.settings = settings

    def _write_settings(self) -> Path:
        path = self.directory / "strongswan.conf"
        path.write_text(
            f"""charon {{
  load = {PLUGINS}
  install_virtual_ip = no
  {self.settings}
  filelog {{
    main {{
      path = {self._log_path}
      default = 1
      ike = 2
      knl = 1
      flush_line = yes
      time_format = %H:%M:%S
    }}
  }}
  plugins {{
    vici {{
      socket = unix://{self.vici_path}
    }}
    kernel-libipsec {{
      allow_peer_ts = yes
    }}
  }}
}}
swanctl {{
  load = random nonce openssl pem pkcs1 pkcs8 x509 pubkey
}}
"""
        )
        return path

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "STRONGSWAN_CONF": str(self.directory / "strongswan.conf"), "SWANCTL_DIR": str(self.directory)}

    def prepare(self) -> None:
        """What `swanctl` and charon need in the directory; for one who only wants `swanctl`."""
        if missing(self.root):
            raise LabError(f"{self.kind} is incomplete: {missing(self.root)} (make peers installs it)")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write_settings()
        for program in (CHARON, SWANCTL):
            shutil.copy(self.root.file(program), self.directory)

    def start(self) -> None:
        self.prepare()
        charon = str(self.directory / CHARON.name)
        self.vici_path.unlink(missing_ok=True)
        process = self.namespace.start(self.root.argv(self.namespace.directory, [charon]), f"charon-{self.directory.name}", env=self._environment())
        self._process = process

        def ready() -> bool:
            if not process.running:
                raise LabError(f"charon ended with status {process.status}\n{process.log()}\n{self.log()}")
            return self._answers()

        wait_until(ready, "charon's VICI socket", READY_SECONDS, 0.02)
        self.load()

    def swanctl(self, *arguments: str, uri: Path | None = None) -> str:
        """Run swanctl with `arguments`, against this daemon or another's socket; its output. LabError when it fails."""
        argv = [str(self.directory / SWANCTL.name), *arguments, "--uri", f"unix://{uri or self.vici_path}"]
        done = self.namespace.run(self.root.argv(self.namespace.directory, argv), check=False, env=self._environment())
        if done.returncode:
            raise LabError(f"swanctl {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}\n{self.log()[-4000:]}")
        return done.stdout + done.stderr

    def load(self, uri: Path | None = None) -> str:
        """`swanctl --load-all` of the configuration, into this daemon or another."""
        return self.swanctl("--load-all", "--noprompt", "--file", str(self.config), uri=uri)


class NewerStrongSwan(StrongSwan):
    """The one of a newer Debian, which knows additional key exchanges (RFC 9370) and ML-KEM."""

    kind = "newer strongSwan"
    root = NEWER
