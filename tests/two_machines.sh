#!/usr/bin/env bash
# Two hosts, made of network namespaces that share this disk, train what one process trains.
# Needs root, iproute2 and the packages of requirements.txt:   bash tests/two_machines.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
a=nanoexit-a-$$ b=nanoexit-b-$$
trap 'ip netns del $a; ip netns del $b; rm -rf "$work"' EXIT
ip netns add "$a"
ip netns add "$b"
ip link add port netns "$a" type veth peer name port netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev port
ip -n "$b" addr add 10.77.0.2/24 dev port
for host in "$a" "$b"; do
  ip -n "$host" link set lo up
  ip -n "$host" link set port up
done

train=(scripts/train_sft.py configs/tiny.yaml data.count=64 teacher.chunk=16 sft.steps=5 sft.batch_size=8)
train+=(sft.micro_batch=4 evaluate.count=8 "evaluate.caps=[]" run.threads=1)
python "${train[@]}" run.dir="$work/one"

on() {  # host, its address, whether it hosts the rendezvous: here both have one host name
  ip netns exec "$1" env GLOO_SOCKET_IFNAME=port python scripts/torchrun.py --nnodes 2 \
    --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 --local-addr "$2" \
    --rdzv-conf is_host="$3" "${train[@]}" run.dir="$work/two"
}
on "$a" 10.77.0.1 true &
on "$b" 10.77.0.2 false
wait $!

python - "$work" <<'END'
import sys
from pathlib import Path
from safetensors.torch import load_file

one, two = (Path(sys.argv[1]) / name / "adapter" for name in ("one", "two"))
for path in sorted(one.glob("*.safetensors")):
    found, expected = load_file(two / path.name), load_file(path)
    most = max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())
    print(f"{path.name}: weights of two machines and of one process differ by {most:.1e} at most")
    assert most < 1e-5
END
