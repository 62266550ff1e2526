# SPDX-License-Identifier: Apache-2.0
"""qcow2: QEMU's copy-on-write image format, versions 2 and 3.

Written from the specification (docs/interop/qcow2 in QEMU's documentation). Read in this order:
layout, header, table_cache, metadata_writer, refcount, cluster_map, guest_read, guest_write,
guest_erase, guest_compress, and driver for how they meet a request; create for how an image begins,
overlap_check and corrupt_mark for how it ends badly; tree_references, shadow_tables and snapshot
for internal snapshots.
"""
