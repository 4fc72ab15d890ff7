#!/bin/sh
# The tests from nothing, on Debian or Ubuntu, in any CI: programs, a virtual environment, pytest.
#
#   ci.sh [TTP]     TTP: a checkout of ttp, or what pip calls it (default: the one this is in)
set -eu
cd "$(dirname "$0")"
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
programs='tor nft ip unshare slirp4netns dnsmasq curl openssl'
packages='tor nftables iproute2 util-linux slirp4netns dnsmasq-base curl openssl ca-certificates'
PATH=$PATH:/usr/sbin:/sbin
for program in $programs; do
    command -v "$program" >/dev/null || missing=yes
done
if [ "${missing-}" ]; then
    $as_root apt-get update
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages
fi
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet "${1:-../..}[pytest]"
.venv/bin/pytest --leak-evidence evidence
