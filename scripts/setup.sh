#!/usr/bin/env bash
# Install what the tests and the demonstration need: setup.sh VENV
# Slurm and other programs come from Debian's packages, Python packages from pip into VENV. Installed programs stay.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# A package is installed only if its program is missing, so that a Slurm from another source is used as well.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=()
need() { # PROGRAM PACKAGE...
  command -v "$1" >/dev/null 2>&1 || missing+=("${@:2}")
}
need munged munge
need slurmctld slurmctld slurm-wlm-basic-plugins
need slurmd slurmd
need sbatch slurm-client
need slurmdbd slurmdbd slurm-wlm-mysql-plugin
need mariadbd mariadb-server
# Debian's PostgreSQL server programs are not in PATH; the tests find them in this directory.
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || need initdb postgresql
need slurmrestd slurmrestd
# A plugin for tokens, which has no command.
compgen -G '/usr/lib*/slurm*/auth_jwt.so' >/dev/null || compgen -G '/usr/lib/*/slurm*/auth_jwt.so' >/dev/null ||
  missing+=(slurm-wlm-jwt-plugin)
need ps procps
need visudo sudo
# Reverse proxies in front of the gateway, and a checker for its unit.
need nginx nginx-light
need caddy caddy
need openssl openssl
need systemd-analyze systemd
# The tests' networks: namespaces as hosts, and firewalls between them.
need ip iproute2
need nft nftables
need nsenter util-linux
# Nodes with wrong clocks.
need faketime faketime
# The login node of the tests.
need sshd openssh-server
need ssh-agent openssh-client
need chromium chromium
need chromedriver chromium-driver

# Debian's python3 has no ensurepip without python3-venv.
usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
find_python() {
  local candidate
  for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if candidate=$(command -v "$candidate") && usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  return 1
}
find_python >/dev/null || missing+=(python3-venv)

install_packages() {
  local as_root=() rc=0 policy=/usr/sbin/policy-rc.d ours=
  command -v apt-get >/dev/null 2>&1 || die "install these first (Debian's names): ${missing[*]}"
  if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      die "root is needed once: sudo apt-get install --no-install-recommends ${missing[*]}"
    fi
    as_root=(sudo -n)
  fi
  say "apt-get install ${missing[*]}"
  # Packages must not start services here: the private Slurm starts its own daemons.
  if [ ! -e "$policy" ]; then
    ours=yes
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
  fi
  {
    "${as_root[@]}" apt-get update -qq &&
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}"
  } </dev/null >&2 || rc=$?
  [ -z "$ours" ] || "${as_root[@]}" rm -f "$policy"
  [ "$rc" = 0 ] || die "apt-get failed; see above"
}

[ ${#missing[@]} = 0 ] || install_packages

python=$(find_python) || die "no Python >= 3.10 with venv: apt-get install python3-venv"
if ! "$venv/bin/python" -c '' 2>/dev/null; then
  say "$python -m venv $venv"
  "$python" -m venv --clear "$venv"
fi
say "pip install -e .[test,dev]"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[test,dev]' </dev/null
say "set up: $("$venv/bin/python" -V) in $venv, $(slurmctld -V)"
