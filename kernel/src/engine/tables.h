/*
 * Tables of a format as the engine reads them: a layout that the driver describes, the place of each map unit's table,
 * and the decoding of one entry. tables.c keeps layouts and places, table_fill.c reads tables into the map cache,
 * table_check.c says what they may say, table_runs.c makes runs of their bytes.
 */
#ifndef TAPFS_TABLES_H
#define TAPFS_TABLES_H

#include <endian.h>
#include <string.h>

#include "host/host.h"
#include "engine/engine.h"

/* Changes of places and maps are counted in this many classes of units. */
#define TABLE_STAMPS 1024u
/* The bits of one map unit, which limits the runs that it can have. */
#define BITMAP_BYTES_MAX (64u << 10)

struct table {
    tapfs_table layout;
    uint64_t granule;
    uint64_t span;         /* bytes of the disk that one entry stands for */
    uint32_t entry_stride; /* bytes from one entry to the next */
    uint32_t entry_bits;   /* bytes of an entry's bitmap that lies outside the table; 0: none does */
    uint32_t reserved_count;
    uint32_t pieces; /* of a map unit in the cache: a large table is read and cached in parts */
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
    uint8_t kind; /* or TAPFS_RULE_ASK */
    bool in_place;
    bool bitmapped;
};

static inline uint64_t table_load(const struct table *table, const uint8_t *bytes, uint32_t width)
{
    if (width == 4) {
        uint32_t word;
        memcpy(&word, bytes, sizeof word);
        return table->layout.big_endian ? be32toh(word) : le32toh(word);
    }
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return table->layout.big_endian ? be64toh(word) : le64toh(word);
}

static inline uint64_t table_word(const struct table *table, const uint8_t *raw, uint64_t index)
{
    return table_load(table, raw + index * table->entry_stride, table->layout.entry_bytes);
}

/* Whether an entry (not the first) is the one before it once more, to the byte. */
static inline bool table_repeats(const struct table *table, const uint8_t *raw, uint64_t index)
{
    const uint8_t *entry = raw + index * table->entry_stride;
    return table->entry_stride == 8 ? memcmp(entry, entry - 8, 8) == 0
           : table->entry_stride == 4 ? memcmp(entry, entry - 4, 4) == 0
                                      : memcmp(entry, entry - table->entry_stride, table->entry_stride) == 0;
}

/* The word behind an entry: which granules are DATA (low half) and which are ZERO. */
static inline uint64_t table_subword(const struct table *table, const uint8_t *raw, uint64_t index)
{
    return table_load(table, raw + index * table->entry_stride + table->layout.entry_bytes, 8);
}

/* The entries of a map unit of that length. */
static inline uint64_t table_entries(const struct table *table, uint64_t unit_length)
{
    return (unit_length + table->span - 1) / table->span;
}

static inline uint64_t table_data_place(const tapfs_table *layout, uint64_t word)
{
    uint64_t number = ((word & layout->place_mask) << layout->place_shift) +
                      ((word & layout->place_low_mask) >> layout->place_low_shift);
    return number * layout->place_multiplier + layout->place_add;
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
        entry.host_offset = table_data_place(layout, word);
        entry.in_place = table->writable && (word & layout->in_place_mask) == layout->in_place_value;
        entry.bitmapped = layout->bitmap.where != TAPFS_BITMAP_NONE &&
                          (word & layout->bitmap.entry_mask) == layout->bitmap.entry_value;
    } else if (entry.kind == TAPFS_COMPRESSED) {
        entry.host_offset = (word & layout->packed_place_mask) << layout->packed_place_shift;
        entry.host_length = word >> layout->packed_length_shift & layout->packed_length_mask;
        if (layout->packed_bound != 0) {
            uint64_t size = layout->data_file == layout->table_file ? atomic_load(&table->host_size) : layout->data_size;
            entry.host_length = entry.host_offset < size ? minimum(layout->packed_bound, size - entry.host_offset) : 0;
        } else if (layout->packed_sector_bytes != 0) {
            entry.host_length = (entry.host_length + 1) * layout->packed_sector_bytes -
                                entry.host_offset % layout->packed_sector_bytes;
        }
    }
    return entry;
}

/* ---- engine/table_check.c */

/* Whether a table, or a word of one, may lie there. */
TAPFS_INTERNAL bool table_place_possible(const struct table *table, uint64_t place, uint64_t bytes);
/* Whether the entries of a map unit may be as they are; `base`: where the unit
 * begins on the disk; `disk_left`: from there to the disk's end.
 * `in_place`: they may say that data is written in place. */
TAPFS_INTERNAL bool table_entries_possible(const struct table *table, const uint8_t *raw, uint64_t entries,
                                           uint64_t base, uint64_t disk_left, bool in_place);
/* Whether the bitmap that a word places may lie there. */
TAPFS_INTERNAL bool table_bits_possible(const struct table *table, uint64_t word, uint64_t place, uint64_t length);

/* ---- engine/table_runs.c. The bytes of a unit are its entries, and behind them the bitmaps that lie elsewhere. */

/*
 * The runs of [inner, stop) of a unit that begins at `base` and is `entries` long, clipped (a COMPRESSED run keeps its
 * payload); only counted where `runs` is NULL.
 */
TAPFS_INTERNAL size_t table_runs(const struct table *table, const uint8_t *raw, uint64_t entries, uint64_t base,
                                 uint64_t inner, uint64_t stop, tapfs_extent *runs, size_t capacity);

#endif
