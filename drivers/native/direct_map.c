/* SPDX-License-Identifier: Apache-2.0
 *
 * Open addressing with linear probing. The hash is the top of a multiplication by the golden ratio,
 * which spreads neighbours; page 0, the only one of a raw device's map, lands in slot 0. Deletion
 * moves what follows back instead of leaving tombstones: a map lives as long as its export.
 *
 * Which pages are entered is the guest's choice, and the hash is no secret. So how far an entry may
 * lie from its home slot is bounded, and with it every look-up: what finds no slot in reach isn't
 * entered, which costs misses only. At half load chance alone doesn't get there. */

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAP_CAPACITY_FIRST = 16,
    MAP_PROBES_MAX = 128, /* 2 KiB of the table */
};

#define MAP_NOTHING UINT64_MAX

static uint64_t map_home(uint64_t page, uint64_t capacity)
{
    return page * UINT64_C(0x9E3779B97F4A7C15) >> (64 - __builtin_ctzll(capacity));
}

/* The entry of a page, or the empty slot in which it would be, or NULL: neither is in reach. */
static struct map_entry *map_slot(struct map_entry *table, uint64_t capacity, uint64_t page)
{
    uint64_t home = map_home(page, capacity);
    uint64_t probes = capacity < MAP_PROBES_MAX ? capacity : MAP_PROBES_MAX;

    for (uint64_t i = 0; i < probes; i++) {
        struct map_entry *entry = &table[(home + i) & (capacity - 1)];

        if (entry->page == page || entry->page == MAP_NOTHING)
            return entry;
    }
    return NULL;
}

static struct map_entry *map_entry_of(const struct direct_map *map, uint64_t page)
{
    struct map_entry *entry;

    if (map->count == 0 || page == MAP_NOTHING)
        return NULL;
    entry = map_slot(map->table, map->capacity, page);
    return entry != NULL && entry->page == page ? entry : NULL;
}

static int map_grow(struct direct_map *map)
{
    uint64_t capacity = map->capacity != 0 ? 2 * map->capacity : MAP_CAPACITY_FIRST;
    uint64_t count = 0;
    struct map_entry *table;

    if (capacity > SIZE_MAX / sizeof(*table) || (table = malloc(capacity * sizeof(*table))) == NULL)
        return -ENOMEM;
    memset(table, 0xff, capacity * sizeof(*table)); /* page is MAP_NOTHING */
    for (uint64_t i = 0; i < map->capacity; i++) {
        const struct map_entry *entry = &map->table[i];
        struct map_entry *slot;

        if (entry->page == MAP_NOTHING)
            continue;
        slot = map_slot(table, capacity, entry->page);
        if (slot != NULL) {
            *slot = *entry;
            count++;
        }
    }
    free(map->table);
    map->table = table;
    map->capacity = capacity;
    map->count = count;
    return 0;
}

/* Empties a slot, and moves entries back that lie behind it because it was taken. */
static void map_delete(struct direct_map *map, uint64_t hole)
{
    uint64_t mask = map->capacity - 1;
    uint64_t next = hole;

    for (;;) {
        const struct map_entry *entry;
        uint64_t displaced;

        next = (next + 1) & mask;
        entry = &map->table[next];
        if (entry->page == MAP_NOTHING)
            break;
        displaced = (next - map_home(entry->page, map->capacity)) & mask;
        if (displaced >= ((next - hole) & mask)) {
            map->table[hole] = *entry;
            hole = next;
        }
    }
    map->table[hole].page = MAP_NOTHING;
    map->count--;
}

struct direct_map *direct_map_open(int32_t fd, int32_t io, uint32_t page_bits, uint64_t length,
                                   uint32_t request_alignment, uint32_t memory_alignment,
                                   int32_t durable)
{
    struct direct_map *map = page_bits < 64 ? calloc(1, sizeof(*map)) : NULL;

    if (map == NULL)
        return NULL;
    map->fd = fd;
    map->io = io;
    map->durable = durable;
    map->page_bits = page_bits;
    map->alignment_mask = request_alignment - 1;
    map->memory_mask = memory_alignment - 1;
    map->length = length & ~(uint64_t)map->alignment_mask;
    map->pins.next = map->pins.previous = &map->pins;
    return map;
}

void direct_map_close(struct direct_map *map)
{
    free(map->table);
    free(map);
}

int direct_map_publish(struct direct_map *map, uint64_t page, uint64_t value)
{
    struct map_entry *slot = map_entry_of(map, page);

    if (slot != NULL) {
        slot->value = value;
        return 0;
    }
    if (page == MAP_NOTHING)
        return -EINVAL;
    if (2 * (map->count + 1) > map->capacity && map_grow(map) < 0)
        return -ENOMEM;
    slot = map_slot(map->table, map->capacity, page);
    if (slot == NULL)
        return -ENOMEM;
    slot->page = page;
    slot->value = value;
    map->count++;
    return 0;
}

void direct_map_withdraw(struct direct_map *map, uint64_t first, uint64_t last)
{
    if (map->count == 0 || first > last)
        return;
    if (last - first < map->count) {
        for (uint64_t page = first;; page++) {
            const struct map_entry *entry = map_entry_of(map, page);

            if (entry != NULL)
                map_delete(map, (uint64_t)(entry - map->table));
            if (page == last)
                return;
        }
    }
    for (uint64_t i = 0; i < map->capacity;) {
        uint64_t page = map->table[i].page;

        /* Whatever moves here, into the hole, is looked at in its turn: i stays. What moves from
         * the beginning of the table to its end has been looked at. */
        if (page != MAP_NOTHING && page >= first && page <= last)
            map_delete(map, i);
        else
            i++;
    }
}

void direct_map_clear(struct direct_map *map)
{
    free(map->table);
    map->table = NULL;
    map->capacity = 0;
    map->count = 0;
}

/* Whether the pages behind `page`, to `last`, lie in the host file right behind it. */
static int map_is_contiguous(const struct direct_map *map, uint64_t page, uint64_t last,
                             uint64_t host, int32_t writable)
{
    while (page != last) {
        const struct map_entry *entry = map_entry_of(map, ++page);

        host += UINT64_C(1) << map->page_bits;
        if (entry == NULL || entry->value >> 1 != host || (writable && !(entry->value & 1)))
            return 0;
    }
    return 1;
}

int64_t direct_map_find(const struct direct_map *map, uint64_t offset, uint64_t length,
                        int32_t writable)
{
    const struct map_entry *entry;
    uint64_t page, last, host;

    /* From here on offset + length doesn't overflow. */
    if (map->held || length == 0 || length > map->length || offset > map->length - length ||
        ((offset | length) & map->alignment_mask) != 0)
        return -1;
    page = offset >> map->page_bits;
    last = (offset + (length - 1)) >> map->page_bits;
    entry = map_entry_of(map, page);
    if (entry == NULL || (writable && !(entry->value & 1)))
        return -1;
    host = entry->value >> 1;
    if (last != page && !map_is_contiguous(map, page, last, host, writable))
        return -1;
    /* Both below 2^63: no overflow. Nor is there a file that reaches further than INT64_MAX. */
    host += offset & ((UINT64_C(1) << map->page_bits) - 1);
    return host <= (uint64_t)INT64_MAX && length <= (uint64_t)INT64_MAX - host ? (int64_t)host : -1;
}

void direct_map_pin(struct direct_map *map, struct map_pin *pin)
{
    pin->serial = ++map->serial;
    pin->next = &map->pins;
    pin->previous = map->pins.previous;
    pin->previous->next = pin;
    map->pins.previous = pin;
}

int direct_map_unpin(struct direct_map *map, struct map_pin *pin)
{
    pin->previous->next = pin->next;
    pin->next->previous = pin->previous;
    if (map->watched == 0 || direct_map_oldest(map) <= map->watched)
        return 0;
    map->watched = 0;
    return 1;
}

uint64_t direct_map_oldest(const struct direct_map *map)
{
    return map->pins.next == &map->pins ? UINT64_MAX : map->pins.next->serial;
}
