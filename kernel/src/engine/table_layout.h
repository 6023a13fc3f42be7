/* The layout of a format's tables as its driver describes it: plain data. tapfs.tables. */
#ifndef TAPFS_TABLE_LAYOUT_H
#define TAPFS_TABLE_LAYOUT_H

#include <stdint.h>

/* cffi: begin */

/* An entry whose bits under `mask` are `value` is of this kind, or its owner is asked. tapfs.tables.Rule */
typedef struct {
    uint64_t mask;
    uint64_t value;
    uint64_t kind; /* or TAPFS_RULE_ASK */
} tapfs_table_rule;

#define TAPFS_RULE_ASK 4

/* Where the bitmap of an entry is. tapfs.tables.Where */
enum { TAPFS_BITMAP_NONE = 0, TAPFS_BITMAP_IN_ENTRY = 1, TAPFS_BITMAP_IN_BLOCK = 2, TAPFS_BITMAP_IN_TABLE = 3 };

/* Which granules of a DATA entry are DATA, one bit for each. tapfs.tables.Bitmap */
typedef struct {
    uint8_t where;
    uint8_t most_significant_first; /* of a byte */
    uint8_t clear_kind;             /* of a granule whose bit is clear: ZERO or UNALLOCATED */
    uint8_t reserved[5];
    uint64_t entry_mask; /* an entry has a bitmap if its bits under entry_mask are entry_value */
    uint64_t entry_value;
    uint64_t block_bytes; /* IN_BLOCK: the bitmap begins so many bytes before the data */
    /* IN_TABLE: the bits of `word_units` map units lie together, where a word says; the words lie at a distance. */
    uint64_t word_place;
    uint64_t word_stride;
    uint64_t word_units;
    uint64_t word_mask; /* the word has a place, as an entry has, if its bits under word_mask are word_value */
    uint64_t word_value;
} tapfs_table_bitmap;

/* How the entries of a layer's tables are laid out. tapfs.tables.TableLayout says what each field means. */
typedef struct {
    uint32_t entry_bytes; /* of a word: 4 or 8; with a bitmap IN_ENTRY a second word of 8 bytes follows */
    uint8_t big_endian;
    uint8_t absent_kind; /* of a unit that has no table: ZERO or UNALLOCATED */
    uint8_t data_whole;
    uint8_t tables_reserved;
    uint8_t flagged_places; /* bit 0 of a table's place: nothing in the table may be in place */
    uint8_t place_is_offset; /* DATA lies where the disk has it */
    uint8_t zeros_keep_places; /* entries that are no DATA may have a place as DATA has */
    uint32_t entry_granules; /* that one entry stands for */
    uint32_t rule_count;
    tapfs_table_rule rules[8]; /* the first that fits decides; without one an entry is DATA */
    tapfs_table_bitmap bitmap;
    uint32_t table_file;
    uint32_t data_file;
    uint64_t host_size; /* no table, payload or beginning of data lies at or past it; see tapfs_disk_set_places */
    uint64_t data_size; /* the same of data_file, where that is another file */
    uint64_t least_place;
    uint64_t table_alignment;
    uint64_t place_mask;
    uint64_t place_shift;
    uint64_t place_low_mask;
    uint64_t place_low_shift;
    uint64_t place_multiplier;
    uint64_t place_add;
    uint64_t place_alignment;
    uint64_t in_place_mask;
    uint64_t in_place_value;
    uint64_t zero_mask;
    uint64_t packed_place_mask;
    uint64_t packed_place_shift;
    uint64_t packed_length_shift;
    uint64_t packed_length_mask;
    uint64_t packed_sector_bytes;
    uint64_t packed_bound;
    uint64_t reserved_start[8];
    uint64_t reserved_end[8];
} tapfs_table;

/* Places of tables that are none. tapfs.tables */
#define TAPFS_TABLE_ABSENT 0
#define TAPFS_TABLE_ASK 18446744073709551615u

/* cffi: end */

#endif
