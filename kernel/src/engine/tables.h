/*
 * Tables of a format as the engine reads them: a layout that the driver describes, the place of each map unit's table,
 * and the decoding of one entry. tables.c fills the map cache from them.
 */
#ifndef TAPFS_TABLES_H
#define TAPFS_TABLES_H

#include <endian.h>
#include <string.h>

#include "host/host.h"
#include "engine/engine.h"

/* Changes of places and maps are counted in this many classes of units. */
#define TABLE_STAMPS 1024u

struct table {
    tapfs_table layout;
    uint64_t granule;
    bool writable;
    size_t unit_count;
    _Atomic uint64_t host_size;
    _Atomic uint64_t *places; /* of the table of each map unit; TAPFS_TABLE_ABSENT, TAPFS_TABLE_ASK */
    /* Moves whenever the map or the place of a unit of the class changes: who read a table before must not cache it. */
    _Atomic uint64_t stamps[TABLE_STAMPS];
    _Atomic uint64_t last_filled; /* unit, for sequential misses */
};

/* What an entry says. */
struct table_entry {
    uint64_t host_offset, host_length;
    uint8_t kind;
    bool in_place;
};

static inline uint64_t table_word(const struct table *table, const uint8_t *raw, uint64_t index)
{
    if (table->layout.entry_bytes == 4) {
        uint32_t word;
        memcpy(&word, raw + index * 4, sizeof word);
        return table->layout.big_endian ? be32toh(word) : le32toh(word);
    }
    uint64_t word;
    memcpy(&word, raw + index * 8, sizeof word);
    return table->layout.big_endian ? be64toh(word) : le64toh(word);
}

static inline struct table_entry table_decode(const struct table *table, uint64_t word)
{
    const tapfs_table *layout = &table->layout;
    struct table_entry entry = {.kind = TAPFS_DATA};

    for (uint32_t i = 0; i < layout->rule_count; i++) {
        if ((word & layout->rules[i].mask) == layout->rules[i].value) {
            entry.kind = (uint8_t)layout->rules[i].kind;
            break;
        }
    }
    if (entry.kind == TAPFS_DATA) {
        entry.host_offset = ((word & layout->place_mask) << layout->place_shift) + layout->place_add;
        entry.in_place = table->writable && (word & layout->in_place_mask) == layout->in_place_value;
    } else if (entry.kind == TAPFS_COMPRESSED) {
        entry.host_offset = word & layout->packed_place_mask;
        entry.host_length = word >> layout->packed_length_shift & layout->packed_length_mask;
        if (layout->packed_sector_bytes != 0) {
            entry.host_length = (entry.host_length + 1) * layout->packed_sector_bytes -
                                entry.host_offset % layout->packed_sector_bytes;
        }
    }
    return entry;
}

#endif
