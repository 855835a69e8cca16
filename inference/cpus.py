"""How many CPUs this process may use."""

import contextlib
import math
import os
from collections.abc import Iterator


def usable_cpus(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Count the CPUs that this process may use: its affinity and, on Linux, the container's quota.

    root: where the control groups are mounted. own: the file that names the groups of this process.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1

    for quota in cpu_quotas(root, own):
        count = min(count, max(1, math.ceil(quota)))
    return count


def cpu_quotas(root: str, own: str) -> Iterator[float]:
    """The quotas, in CPUs, of the control groups of this process and of all groups above them."""
    yield from quotas_above(root, own_groups(own).get("", ""), read_quota_v2)

    for controllers, group in own_groups(own).items():
        if "cpu" in controllers.split(","):
            # Version 1 mounts each controller by itself, or several together as "cpu,cpuacct".
            for mount in {controllers, "cpu"}:
                yield from quotas_above(os.path.join(root, mount), group, read_quota_v1)


def own_groups(own: str) -> dict[str, str]:
    """The control groups of this process by their controllers; those of version 2 have none.

    A line is number:controllers:group, such as "0::/user.slice" or "4:cpu,cpuacct:/docker/1f2e".
    """
    groups = {}
    try:
        with open(own, encoding="utf-8", errors="replace") as file:
            for line in file:
                _, controllers, group = line.strip().split(":", 2)
                groups[controllers] = group
    except (OSError, ValueError):
        return {}
    return groups


def quotas_above(mount: str, group: str, read_quota) -> Iterator[float]:
    """The quotas of a group and of the groups above it, which limit it as well.

    A container sees its own group as the mount itself, while its name is that on the host.
    """
    folder = os.path.join(mount, group.strip("/"))
    while len(folder) >= len(mount):
        quota = None
        # The group does not exist here, or has no limit.
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = read_quota(folder)
        if quota is not None:
            yield quota

        folder = os.path.dirname(folder)


def read_quota_v2(folder: str) -> float:
    """Of cpu.max, such as "150000 100000" microseconds. Raises ValueError for "max", no limit."""
    with open(os.path.join(folder, "cpu.max"), encoding="ascii") as file:
        quota, period = file.read().split()
    return int(quota) / int(period)


def read_quota_v1(folder: str) -> float:
    """Of cpu.cfs_quota_us and cpu.cfs_period_us. Raises ValueError for -1, no limit."""
    values = []
    for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"):
        with open(os.path.join(folder, name), encoding="ascii") as file:
            values.append(int(file.read()))

    quota, period = values
    if quota < 0:
        raise ValueError("no limit")
    return quota / period
