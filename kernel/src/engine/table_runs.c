/* The runs of a map unit that is kept as the bytes of its table: entries, and the bits of their granules. */
#include "engine/tables.h"

/* A run inside one entry. */
struct piece {
    uint64_t start, end; /* in the unit */
    struct table_entry entry; /* host_offset: of DATA that of `start`, else of the payload */
};

/* How many of the lowest bits of a word are set. */
static uint32_t trailing_ones(uint32_t bits)
{
    return bits == UINT32_MAX ? 32 : (uint32_t)__builtin_ctz(~bits);
}

/* The kind of granule `at` of an entry with a word of bits, and how many granules from there on are of that kind. */
static uint8_t kind_by_word(uint64_t word, uint8_t clear_kind, uint64_t at, uint64_t *count)
{
    uint32_t data = (uint32_t)word, zero = (uint32_t)(word >> 32), bit = (uint32_t)1 << at;
    uint32_t same = (data & bit) != 0 ? data : (zero & bit) != 0 ? zero : ~(data | zero);

    *count = minimum(trailing_ones(same >> at), 32 - at);
    return (data & bit) != 0 ? TAPFS_DATA : (zero & bit) != 0 ? TAPFS_ZERO : clear_kind;
}

static bool bit_of(const uint8_t *bits, bool most_significant_first, uint64_t at)
{
    return (bits[at / 8] >> (most_significant_first ? 7 - at % 8 : at % 8) & 1) != 0;
}

/* The same of `total` granules with bits in bytes. */
static uint8_t kind_by_bits(const tapfs_table_bitmap *bitmap, const uint8_t *bits, uint64_t at, uint64_t total,
                            uint64_t *count)
{
    bool msb = bitmap->most_significant_first != 0, set = bit_of(bits, msb, at);
    uint8_t uniform = set ? UINT8_MAX : 0;
    uint64_t end = at + 1;

    while (end < total) {
        if (end % 8 == 0 && bits[end / 8] == uniform) {
            end += 8;
        } else if (bit_of(bits, msb, end) == set) {
            end++;
        } else {
            break;
        }
    }
    *count = end - at;
    return set ? TAPFS_DATA : bitmap->clear_kind;
}

/* Where the next run begins: an entry, and a granule of it. */
struct cursor {
    uint64_t index, at;
};

/* The run at the cursor, as far as its entry goes; the cursor moves behind it. An entry without a bitmap is one run. */
static struct piece next_piece(const struct table *table, const uint8_t *raw, uint64_t entries, struct cursor *cursor)
{
    const tapfs_table *layout = &table->layout;
    uint64_t index = cursor->index, at = cursor->at;
    struct piece piece = {.entry = table_decode(table, table_word(table, raw, index))};

    if (!piece.entry.bitmapped) {
        piece.start = index * table->span;
        piece.end = piece.start + table->span;
        *cursor = (struct cursor){.index = index + 1};
        return piece;
    }
    uint64_t count;
    if (layout->bitmap.where == TAPFS_BITMAP_IN_ENTRY) {
        piece.entry.kind = kind_by_word(table_subword(table, raw, index), layout->bitmap.clear_kind, at, &count);
    } else {
        const uint8_t *bits = raw + entries * table->entry_stride + index * table->entry_bits;
        piece.entry.kind = kind_by_bits(&layout->bitmap, bits, at, layout->entry_granules, &count);
    }
    piece.start = index * table->span + at * table->granule;
    piece.end = piece.start + count * table->granule;
    if (piece.entry.kind == TAPFS_DATA) {
        piece.entry.host_offset += at * table->granule;
    } else {
        piece.entry = (struct table_entry){.kind = piece.entry.kind};
    }
    cursor->at = at + count == layout->entry_granules ? 0 : at + count;
    cursor->index = cursor->at == 0 ? index + 1 : index;
    return piece;
}

/* Move behind entries that are the same: what has no place goes on so, and most of a table is often that. */
static void skip_repeated(const struct table *table, const uint8_t *raw, uint64_t stop, struct cursor *cursor,
                          struct piece *run)
{
    if (cursor->at != 0 || run->entry.kind == TAPFS_DATA || run->entry.kind == TAPFS_COMPRESSED ||
        run->end - run->start < table->span) {
        return;
    }
    /* Entries that are the same may have different bits, where those are elsewhere. */
    if (table->entry_bits != 0 && table_decode(table, table_word(table, raw, cursor->index - 1)).bitmapped) {
        return;
    }
    while (run->end < stop && table_repeats(table, raw, cursor->index)) {
        run->end += table->span;
        cursor->index++;
    }
}

static bool continues(const struct table_entry *left, uint64_t distance, const struct table_entry *right)
{
    return left->kind == right->kind && left->kind != TAPFS_COMPRESSED && left->in_place == right->in_place &&
           (left->kind != TAPFS_DATA || left->host_offset + distance == right->host_offset);
}

size_t table_runs(const struct table *table, const uint8_t *raw, uint64_t entries, uint64_t base, uint64_t inner,
                  uint64_t stop, tapfs_extent *runs, size_t capacity)
{
    struct cursor cursor = {.index = inner / table->span, .at = inner % table->span / table->granule};
    size_t found = 0;

    if (inner >= stop) {
        return 0;
    }
    for (struct piece run = next_piece(table, raw, entries, &cursor); found < capacity;) {
        struct piece next = run;
        skip_repeated(table, raw, stop, &cursor, &run);
        while (run.end < stop) {
            next = next_piece(table, raw, entries, &cursor);
            if (!continues(&run.entry, run.end - run.start, &next.entry)) {
                break;
            }
            run.end = next.end;
        }
        uint64_t end = minimum(run.end, stop);
        bool data = run.entry.kind == TAPFS_DATA;
        if (runs != NULL) {
            runs[found] = (tapfs_extent){
                .offset = base + inner,
                .length = end - inner,
                .host_offset = run.entry.host_offset + (data ? inner - run.start : 0),
                .host_length = run.entry.host_length,
                .file = data || run.entry.kind == TAPFS_COMPRESSED ? table->layout.data_file : 0,
                .kind = run.entry.kind,
                .in_place = run.entry.in_place,
            };
        }
        found++;
        if (end >= stop) {
            break;
        }
        inner = end;
        run = next;
    }
    return found;
}
