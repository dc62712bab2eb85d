#!/usr/bin/env bash
# Run a command in a root file system: in_rootfs.sh ROOT COMMAND… slurm_rootfs.py calls it in new namespaces.
# bash is process 1 there and reaps daemons. The mounts end with the namespace.
set -euo pipefail
root=$1
shift

# pivot_root needs a mount. Unlike chroot it allows tests to make namespaces.
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
# So that a run leaves nothing in /tmp, even if it is killed.
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs tmpfs etc/apt/sources.list.d
echo "$APT_LINE" >etc/apt/sources.list.d/debian.list

for path in $MOUNTED; do
  [ -e "$path" ] || continue
  mkdir -p ".$(dirname "$path")"
  if [ -d "$path" ]; then mkdir -p ".$path"; else touch ".$path"; fi
  mount --bind "$path" ".$path"
  mount -o remount,bind,ro ".$path"
done
unset APT_LINE MOUNTED

mkdir -p .outside
pivot_root . .outside
cd /project
umount -l /.outside

"$@"
