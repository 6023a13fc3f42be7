/* The check of a table by its layout: what the layout does not allow is left to the owner, who says what is wrong. */
#include "engine/internal.h"
#include "engine/tables.h"

/* Whether [start, start + length) of the host file is no metadata that the driver named. */
static bool unreserved(const struct table *table, uint64_t start, uint64_t length)
{
    const tapfs_table *layout = &table->layout;
    for (size_t i = 0; i < table->reserved_count; i++) {
        if (start < layout->reserved_end[i] && layout->reserved_start[i] < start + length) {
            return false;
        }
    }
    return start >= layout->least_place;
}

bool table_place_possible(const struct table *table, uint64_t place, uint64_t bytes)
{
    return place % table->layout.table_alignment == 0 && in_host_range(place, bytes) &&
           place + bytes <= atomic_load(&table->host_size) &&
           (table->layout.tables_reserved || unreserved(table, place, bytes));
}

/* Where data and payloads may be: the length of their file, and whether it is the one with the tables. */
struct bounds {
    const struct table *table;
    uint64_t size, base; /* of the file, of the unit on the disk */
    bool shared, in_place;
};

static bool free_of_metadata(const struct bounds *bounds, uint64_t start, uint64_t length)
{
    return !bounds->shared || unreserved(bounds->table, start, length);
}

/* `present`: how much of the data must be in the file. */
static bool data_possible(const struct bounds *bounds, const struct table_entry *entry, uint64_t present)
{
    const tapfs_table *layout = &bounds->table->layout;
    uint64_t start = entry->host_offset, before = 0;

    if (entry->bitmapped && layout->bitmap.where == TAPFS_BITMAP_IN_BLOCK) {
        before = layout->bitmap.block_bytes;
    }
    return start % layout->place_alignment == 0 && start >= before && in_host_range(start, bounds->table->span) &&
           start + present <= bounds->size &&
           free_of_metadata(bounds, start - before, bounds->table->span + before);
}

static bool payload_possible(const struct bounds *bounds, const struct table_entry *entry)
{
    return entry->host_length > 0 && entry->host_length <= COMPRESSED_LENGTH_MAX &&
           in_host_range(entry->host_offset, entry->host_length) &&
           entry->host_offset + entry->host_length <= bounds->size &&
           free_of_metadata(bounds, entry->host_offset, entry->host_length);
}

/* Whether data of entry `index` lies where this format has it. */
static bool place_fits(const struct bounds *bounds, uint64_t index, const struct table_entry *entry)
{
    const struct table *table = bounds->table;
    return table->layout.place_is_offset == 0 || entry->host_offset == bounds->base + index * table->span;
}

/* Whether entry `index` of a table may be as it is; `length`: how much of what it stands for is on the disk. `empty`: it
 * may be so anywhere. */
static bool entry_possible(const struct bounds *bounds, const uint8_t *raw, uint64_t index, uint64_t length, bool *empty)
{
    const struct table *table = bounds->table;
    const tapfs_table *layout = &table->layout;
    uint64_t word = table_word(table, raw, index);
    struct table_entry entry = table_decode(table, word);
    bool subword = layout->bitmap.where == TAPFS_BITMAP_IN_ENTRY;
    uint64_t bits = subword ? table_subword(table, raw, index) : 0;

    *empty = entry.kind == TAPFS_ZERO || entry.kind == TAPFS_UNALLOCATED;
    switch (entry.kind) {
    case TAPFS_DATA:
        if (entry.in_place && !bounds->in_place) {
            return false;
        }
        if ((word & layout->zero_mask) != 0 || (subword && entry.bitmapped && (bits & bits >> 32) != 0)) {
            return false;
        }
        return (subword && entry.bitmapped && (uint32_t)bits == 0) ||
               (place_fits(bounds, index, &entry) &&
                data_possible(bounds, &entry, layout->data_whole ? length : 1));
    case TAPFS_COMPRESSED:
        return bits == 0 && payload_possible(bounds, &entry);
    default:
        return entry.kind != TAPFS_RULE_ASK;
    }
}

bool table_entries_possible(const struct table *table, const uint8_t *raw, uint64_t entries, uint64_t base,
                            uint64_t disk_left, bool in_place)
{
    struct bounds bounds = {.table = table, .base = base, .in_place = in_place};
    bounds.shared = table->layout.data_file == table->layout.table_file;
    bounds.size = bounds.shared ? atomic_load(&table->host_size) : table->layout.data_size;
    bool empty = false;
    for (uint64_t i = 0; i < entries; i++) {
        if (empty && table_repeats(table, raw, i)) {
            continue;
        }
        if (!entry_possible(&bounds, raw, i, minimum(table->span, disk_left - i * table->span), &empty)) {
            return false;
        }
    }
    return true;
}

bool table_bits_possible(const struct table *table, uint64_t word, uint64_t place, uint64_t length)
{
    return (word & table->layout.zero_mask) == 0 && place % table->layout.place_alignment == 0 &&
           in_host_range(place, length) && place + length <= atomic_load(&table->host_size) &&
           unreserved(table, place, length);
}
