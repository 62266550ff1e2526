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
#define SLICE_USED UINT64_C(1)

static uint64_t map_home(uint64_t key, uint64_t capacity)
{
    return key * UINT64_C(0x9E3779B97F4A7C15) >> (64 - __builtin_ctzll(capacity));
}

/* The entry of a key, or the empty slot in which it would be, or NULL: neither is in reach. */
static struct map_entry *map_slot(struct map_entry *entries, uint64_t capacity, uint64_t key)
{
    uint64_t home = map_home(key, capacity);
    uint64_t probes = capacity < MAP_PROBES_MAX ? capacity : MAP_PROBES_MAX;

    for (uint64_t i = 0; i < probes; i++) {
        struct map_entry *entry = &entries[(home + i) & (capacity - 1)];

        if (entry->key == key || entry->key == MAP_NOTHING)
            return entry;
    }
    return NULL;
}

static struct map_entry *map_entry_of(const struct map_table *table, uint64_t key)
{
    struct map_entry *entry;

    if (table->count == 0 || key == MAP_NOTHING)
        return NULL;
    entry = map_slot(table->entries, table->capacity, key);
    return entry != NULL && entry->key == key ? entry : NULL;
}

static int map_grow(struct map_table *table)
{
    uint64_t capacity = table->capacity != 0 ? 2 * table->capacity : MAP_CAPACITY_FIRST;
    uint64_t count = 0;
    struct map_entry *entries;

    if (capacity > SIZE_MAX / sizeof(*entries) ||
        (entries = malloc(capacity * sizeof(*entries))) == NULL)
        return -ENOMEM;
    memset(entries, 0xff, capacity * sizeof(*entries)); /* key is MAP_NOTHING */
    for (uint64_t i = 0; i < table->capacity; i++) {
        const struct map_entry *entry = &table->entries[i];
        struct map_entry *slot;

        if (entry->key == MAP_NOTHING)
            continue;
        slot = map_slot(entries, capacity, entry->key);
        if (slot != NULL) {
            *slot = *entry;
            count++;
        }
    }
    free(table->entries);
    table->entries = entries;
    table->capacity = capacity;
    table->count = count;
    return 0;
}

static int map_enter(struct map_table *table, uint64_t key, uint64_t value)
{
    struct map_entry *slot = map_entry_of(table, key);

    if (slot != NULL) {
        slot->value = value;
        return 0;
    }
    if (key == MAP_NOTHING)
        return -EINVAL;
    if (2 * (table->count + 1) > table->capacity && map_grow(table) < 0)
        return -ENOMEM;
    slot = map_slot(table->entries, table->capacity, key);
    if (slot == NULL)
        return -ENOMEM;
    slot->key = key;
    slot->value = value;
    table->count++;
    return 0;
}

/* Empties a slot, and moves entries back that lie behind it because it was taken. */
static void map_delete(struct map_table *table, uint64_t hole)
{
    uint64_t mask = table->capacity - 1;
    uint64_t next = hole;

    for (;;) {
        const struct map_entry *entry;
        uint64_t displaced;

        next = (next + 1) & mask;
        entry = &table->entries[next];
        if (entry->key == MAP_NOTHING)
            break;
        displaced = (next - map_home(entry->key, table->capacity)) & mask;
        if (displaced >= ((next - hole) & mask)) {
            table->entries[hole] = *entry;
            hole = next;
        }
    }
    table->entries[hole].key = MAP_NOTHING;
    table->count--;
}

/* Takes the keys first to last (included) out. */
static void map_remove(struct map_table *table, uint64_t first, uint64_t last)
{
    if (table->count == 0 || first > last)
        return;
    if (last - first < table->count) {
        for (uint64_t key = first;; key++) {
            const struct map_entry *entry = map_entry_of(table, key);

            if (entry != NULL)
                map_delete(table, (uint64_t)(entry - table->entries));
            if (key == last)
                return;
        }
    }
    for (uint64_t i = 0; i < table->capacity;) {
        uint64_t key = table->entries[i].key;

        /* Whatever moves here, into the hole, is looked at in its turn: i stays. What moves from
         * the beginning of the table to its end has been looked at. */
        if (key != MAP_NOTHING && key >= first && key <= last)
            map_delete(table, i);
        else
            i++;
    }
}

static void map_empty(struct map_table *table)
{
    free(table->entries);
    memset(table, 0, sizeof(*table));
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
    free(map->pages.entries);
    free(map->slices.entries);
    free(map);
}

int direct_map_publish(struct direct_map *map, uint64_t page, uint64_t value)
{
    return map_enter(&map->pages, page, value);
}

void direct_map_withdraw(struct direct_map *map, uint64_t first, uint64_t last)
{
    map_remove(&map->pages, first, last);
    map_remove(&map->slices, first >> map->slice_bits, last >> map->slice_bits);
}

void direct_map_clear(struct direct_map *map)
{
    map_empty(&map->pages);
}

void direct_map_set_words(struct direct_map *map, uint32_t slice_bits, uint64_t word_mask,
                          uint64_t word_plain)
{
    map->slice_bits = slice_bits;
    map->word_mask = word_mask;
    map->word_plain = word_plain;
}

int direct_map_show(struct direct_map *map, uint64_t number, uint64_t address, uint64_t host_end)
{
    if (host_end > map->host_end)
        map->host_end = host_end;
    return map_enter(&map->slices, number, address);
}

/* The entry of a slice whose words are at `address`, or NULL. */
static struct map_entry *map_slice_at(struct direct_map *map, uint64_t number, uint64_t address)
{
    struct map_entry *entry = map_entry_of(&map->slices, number);

    return entry != NULL && (entry->value & ~SLICE_USED) == address ? entry : NULL;
}

void direct_map_hide(struct direct_map *map, uint64_t number, uint64_t address)
{
    const struct map_entry *entry = map_slice_at(map, number, address);

    if (entry != NULL)
        map_delete(&map->slices, (uint64_t)(entry - map->slices.entries));
}

void direct_map_hide_all(struct direct_map *map)
{
    map_empty(&map->slices);
}

int32_t direct_map_was_used(struct direct_map *map, uint64_t number, uint64_t address)
{
    struct map_entry *entry = map_slice_at(map, number, address);
    int32_t used = entry != NULL && (entry->value & SLICE_USED) != 0;

    if (entry != NULL)
        entry->value = address;
    return used;
}

/* Where a page lies by the slice that has its word; MAP_NOTHING when that doesn't say. */
static uint64_t map_host_by_word(struct direct_map *map, uint64_t page)
{
    struct map_entry *entry = map_entry_of(&map->slices, page >> map->slice_bits);
    uint64_t size = UINT64_C(1) << map->page_bits;
    uint64_t word, host;

    if (entry == NULL)
        return MAP_NOTHING;
    word = ((const uint64_t *)(uintptr_t)(entry->value & ~SLICE_USED))
        [page & ((UINT64_C(1) << map->slice_bits) - 1)];
    host = word & map->word_mask;
    if (host == 0 || (word & ~(map->word_mask | map->word_plain)) != 0 ||
        (host & (size - 1)) != 0 || host > map->host_end || size > map->host_end - host)
        return MAP_NOTHING;
    entry->value |= SLICE_USED;
    return host;
}

/* Where a page lies; MAP_NOTHING when it isn't known, or may not be written and is to be. */
static uint64_t map_host_of(struct direct_map *map, uint64_t page, int32_t writable)
{
    const struct map_entry *entry = map_entry_of(&map->pages, page);

    if (entry != NULL && (!writable || (entry->value & 1)))
        return entry->value >> 1;
    return writable || map->slices.count == 0 ? MAP_NOTHING : map_host_by_word(map, page);
}

/* Whether the pages behind `page`, to `last`, lie in the host file right behind it. */
static int map_is_contiguous(struct direct_map *map, uint64_t page, uint64_t last, uint64_t host,
                             int32_t writable)
{
    while (page != last) {
        host += UINT64_C(1) << map->page_bits;
        if (map_host_of(map, ++page, writable) != host)
            return 0;
    }
    return 1;
}

int64_t direct_map_find(struct direct_map *map, uint64_t offset, uint64_t length, int32_t writable)
{
    uint64_t page, last, host;

    /* From here on offset + length doesn't overflow. */
    if (map->held || length == 0 || length > map->length || offset > map->length - length ||
        ((offset | length) & map->alignment_mask) != 0)
        return -1;
    page = offset >> map->page_bits;
    last = (offset + (length - 1)) >> map->page_bits;
    host = map_host_of(map, page, writable);
    if (host == MAP_NOTHING ||
        (last != page && !map_is_contiguous(map, page, last, host, writable)))
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
