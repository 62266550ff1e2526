/* SPDX-License-Identifier: Apache-2.0 */
/* A client that maps a large disk wants millions of L2 entries looked at; here that takes a few
 * nanoseconds each. What is not plain is left to Python. */

uint32_t plain_entries(struct plain_walk *walk, const uint64_t *words, uint32_t count,
                       uint64_t *lengths)
{
    uint32_t taken, runs = 0, was_data = 0;

    for (taken = 0; taken < count; taken++) {
        uint64_t host = words[taken] & walk->offset_mask;
        uint32_t is_data = host != 0;

        if (words[taken] & walk->odd || (is_data && (host < walk->start || host >= walk->end)))
            break;
        if (runs == 0 || is_data != was_data) {
            if (runs == walk->runs_max)
                break;
            if (runs == 0)
                walk->is_data = is_data;
            was_data = is_data;
            lengths[runs++] = 0;
        }
        lengths[runs - 1] += walk->cluster_bytes;
    }
    walk->runs = runs;
    return taken;
}
