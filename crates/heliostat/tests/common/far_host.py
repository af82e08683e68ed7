"""A host at the other end of a slow, lossy line that can be cut: a network namespace, and this process as the line.

far_host.py HERE THERE [MTU] opens a TUN interface in this namespace with the address HERE, makes a namespace of its
own with one that has THERE, and carries packets between them, because kernels without netem cannot. Programs are
started over there with `nsenter --target PID --net`. Prints `ready` when both ends are up. Reads orders, a line each,
and answers `done`:

    delay MS      every packet takes so many milliseconds, each way
    loss PERCENT  so many of a hundred packets are lost, chosen by a generator that starts alike each time
    cut           nothing passes any more
    mend          packets pass again

Ends when its input does; namespace and interfaces go with it. Takes root.
"""

import collections
import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
# As many packets as a line of that kind has under way; more are lost, as on any line.
UNDER_WAY = 20000


def interface(name, address, mtu):
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    for order in (
        f"address add {address}/30 dev {name}",
        f"link set {name} mtu {mtu} txqueuelen 10000 up",
        "link set lo up",
    ):
        subprocess.run(["ip", *order.split()], check=True)
    return tun


def main():
    here, there = sys.argv[1], sys.argv[2]
    mtu = int(sys.argv[3]) if len(sys.argv) > 3 else 1500
    name = f"far{os.getpid()}"
    ours = interface(name, here, mtu)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        sys.exit(f"no namespace: {os.strerror(ctypes.get_errno())}")
    theirs = interface(name, there, mtu)
    print("ready", flush=True)
    carry(ours, theirs)


def carry(ours, theirs):
    other = {ours: theirs, theirs: ours}
    delay, loss, is_cut = 0.0, 0.0, False
    chance = random.Random(1)
    under_way = collections.deque()
    orders = sys.stdin.fileno()
    while True:
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, end, packet = under_way.popleft()
            try:
                os.write(end, packet)
            except OSError:
                pass  # The queue of that end is full: lost, as on any line.
        wait = under_way[0][0] - now if under_way else None
        readable, _, _ = select.select([orders, ours, theirs], [], [], wait)
        for end in readable:
            if end == orders:
                order = os.read(orders, 4096).decode().split()
                if not order:
                    return
                match order:
                    case ["delay", ms]:
                        delay = float(ms) / 1000
                    case ["loss", percent]:
                        loss = float(percent) / 100
                    case ["cut"]:
                        is_cut = True
                        under_way.clear()
                    case ["mend"]:
                        is_cut = False
                    case _:
                        sys.exit(f"no such order: {order}")
                print("done", flush=True)
                continue
            for _ in range(64):
                try:
                    packet = os.read(end, 65536)
                except BlockingIOError:
                    break
                is_lost = is_cut or len(under_way) >= UNDER_WAY or (loss and chance.random() < loss)
                if not is_lost:
                    under_way.append((time.monotonic() + delay, other[end], packet))


if __name__ == "__main__":
    main()
