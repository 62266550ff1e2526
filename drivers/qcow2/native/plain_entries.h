/* SPDX-License-Identifier: Apache-2.0 */
/* What a walk through L2 entries is to know, and what it has found. */
struct plain_walk {
    uint64_t odd;         /* an entry with any of these bits ends the walk */
    uint64_t offset_mask; /* where an entry has its host offset; 0 there: unallocated */
    uint64_t start;       /* a host offset outside [start, end) ends the walk, too */
    uint64_t end;
    uint64_t cluster_bytes;
    uint32_t runs_max;
    uint32_t runs;      /* found: in turns data and unallocated */
    uint32_t is_data;   /* found: the first run is */
};

/* Turns up to `count` entries into runs, whose lengths in bytes go to `lengths` (room for runs_max).
 * Returns how many entries that was. */
uint32_t plain_entries(struct plain_walk *walk, const uint64_t *words, uint32_t count,
                       uint64_t *lengths);
