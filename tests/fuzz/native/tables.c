/*
 * Tables of a hostile image as the engine reads them: the map that comes of any bytes covers the disk, data lies in the
 * file, and a write in place spares the metadata that the driver has named. An input is a format, the size of the file,
 * the places of four tables, and the bytes of the file from the tables on.
 */
#include <sys/mman.h>
#include <unistd.h>

#include "engine/internal.h"
#include "fuzz.h"

#define UNITS 4u
#define TABLES_AT 4096u
#define DATA_AT 8192u
#define FILE_MAX (64u << 10)
#define LOOKUPS 100000u
#define RUNS 8192u
#define ALL UINT64_MAX

struct format {
    uint64_t granule, block, unit_blocks;
    uint8_t codec;
    tapfs_table layout;
};

static const struct format formats[] = {
    /* qcow2 */
    {512, 4096, 8, TAPFS_CODEC_RAW_DEFLATE,
     {.entry_bytes = 8, .big_endian = 1, .absent_kind = TAPFS_UNALLOCATED, .entry_granules = 8, .rule_count = 3,
      .rules = {{1ull << 62, 1ull << 62, TAPFS_COMPRESSED}, {1, 1, TAPFS_ZERO}, {ALL, 0, TAPFS_UNALLOCATED}},
      .table_alignment = 512, .place_mask = 0x00fffffffffffe00, .place_multiplier = 1, .place_alignment = 512,
      .in_place_mask = 1ull << 63, .in_place_value = 1ull << 63, .packed_place_mask = (1ull << 58) - 1,
      .packed_length_shift = 58, .packed_length_mask = 0xf, .packed_sector_bytes = 512}},
    /* qcow2 with subclusters */
    {512, 16384, 4, TAPFS_CODEC_ZSTD,
     {.entry_bytes = 8, .big_endian = 1, .absent_kind = TAPFS_UNALLOCATED, .entry_granules = 32, .rule_count = 1,
      .rules = {{1ull << 62, 1ull << 62, TAPFS_COMPRESSED}}, .bitmap = {.where = TAPFS_BITMAP_IN_ENTRY, .clear_kind = TAPFS_UNALLOCATED},
      .table_alignment = 4096, .place_mask = 0x00fffffffffffe00, .place_multiplier = 1, .place_alignment = 4096,
      .in_place_mask = 1ull << 63, .in_place_value = 1ull << 63, .zero_mask = 1, .packed_place_mask = (1ull << 56) - 1,
      .packed_length_shift = 56, .packed_length_mask = 0x3f, .packed_sector_bytes = 512}},
    /* VHD */
    {512, 4096, 2, TAPFS_CODEC_NONE,
     {.entry_bytes = 4, .big_endian = 1, .absent_kind = TAPFS_UNALLOCATED, .entry_granules = 8, .rule_count = 1,
      .rules = {{0xffffffff, 0xffffffff, TAPFS_UNALLOCATED}}, .data_whole = 1, .tables_reserved = 1,
      .bitmap = {.where = TAPFS_BITMAP_IN_BLOCK, .most_significant_first = 1, .clear_kind = TAPFS_UNALLOCATED, .block_bytes = 512},
      .table_alignment = 1, .place_mask = 0xffffffff, .place_shift = 9, .place_multiplier = 1, .place_add = 512,
      .place_alignment = 1}},
    /* VHDX, whose bitmaps of four blocks lie where each fifth word says */
    {512, 4096, 2, TAPFS_CODEC_NONE,
     {.entry_bytes = 8, .absent_kind = TAPFS_UNALLOCATED, .entry_granules = 8, .rule_count = 4,
      .rules = {{7, 0, TAPFS_UNALLOCATED}, {7, 1, TAPFS_ZERO}, {6, 2, TAPFS_ZERO}, {6, 4, TAPFS_RULE_ASK}},
      .bitmap = {.where = TAPFS_BITMAP_IN_TABLE, .clear_kind = TAPFS_UNALLOCATED, .entry_mask = 7, .entry_value = 7, .word_place = TABLES_AT + 32,
                 .word_stride = 40, .word_units = 2, .word_mask = 7, .word_value = 6},
      .tables_reserved = 1, .table_alignment = 8, .place_mask = INT64_MAX & ~0xfffull, .place_multiplier = 1,
      .place_alignment = 4096, .zero_mask = 0xff8 | 1ull << 63}},
    /* VDI */
    {512, 4096, 8, TAPFS_CODEC_NONE,
     {.entry_bytes = 4, .absent_kind = TAPFS_UNALLOCATED, .entry_granules = 8, .rule_count = 2,
      .rules = {{0xffffffff, 0xffffffff, TAPFS_UNALLOCATED}, {0xffffffff, 0xfffffffe, TAPFS_ZERO}}, .data_whole = 1,
      .tables_reserved = 1, .table_alignment = 1, .place_mask = 0xffffffff, .place_multiplier = 4096,
      .place_add = DATA_AT, .place_alignment = 1}},
    /* compressed VMDK, whose grains have headers */
    {512, 4096, 8, TAPFS_CODEC_ZLIB,
     {.entry_bytes = 4, .absent_kind = TAPFS_UNALLOCATED, .entry_granules = 8, .rule_count = 3,
      .rules = {{0xffffffff, 0, TAPFS_UNALLOCATED}, {0xffffffff, 1, TAPFS_ZERO}, {0, 0, TAPFS_COMPRESSED}},
      .tables_reserved = 1, .table_alignment = 1, .place_multiplier = 1, .place_alignment = 1,
      .packed_place_mask = 0xffffffff, .packed_place_shift = 9, .packed_bound = 5120}},
    /* VMDK of VMFS 6 */
    {512, 4096, 8, TAPFS_CODEC_NONE,
     {.entry_bytes = 8, .absent_kind = TAPFS_ZERO, .entry_granules = 8, .rule_count = 5,
      .rules = {{ALL, 0, TAPFS_UNALLOCATED}, {15ull << 60, 1ull << 60, TAPFS_ZERO}, {15ull << 60, 2ull << 60, TAPFS_ZERO},
                {15ull << 60, 3ull << 60, TAPFS_DATA}, {0, 0, TAPFS_RULE_ASK}},
      .tables_reserved = 1, .table_alignment = 1, .place_mask = (1ull << 38) - 1, .place_shift = 24,
      .place_low_mask = 0xfffull << 48, .place_low_shift = 36, .place_multiplier = 1, .place_add = DATA_AT,
      .place_alignment = 1, .zero_mask = ((1ull << 48) - 1) & ~((1ull << 38) - 1)}},
};

static int file;
static uint8_t content[FILE_MAX], pattern[FILE_MAX];

int LLVMFuzzerInitialize(int *count, char ***words)
{
    (void)count;
    (void)words;
    file = memfd_create("image", MFD_CLOEXEC);
    HOLD(file >= 0);
    for (size_t i = 0; i < sizeof pattern; i++) {
        pattern[i] = (uint8_t)(i * 7 / 5);
    }
    return 0;
}

/* The unit that is missing is said to be empty, as an owner might. */
static void supply(tapfs_disk *disk, const tapfs_outcome *miss, uint64_t unit, uint64_t size)
{
    HOLD(miss->layer == 0 && miss->offset < size);
    uint64_t start = miss->offset - miss->offset % unit;
    tapfs_extent extent = {.offset = start, .length = unit < size - start ? unit : size - start, .kind = TAPFS_UNALLOCATED};
    HOLD(tapfs_disk_install(disk, 0, &extent, 1) == 0);
}

static void map_all(tapfs_disk *disk, const struct format *format, uint64_t size, uint64_t file_size, bool places)
{
    static tapfs_mapped runs[RUNS];
    tapfs_outcome outcome;

    for (uint64_t at = 0; at < size;) {
        size_t count = places ? tapfs_map_places(disk, at, size - at, LOOKUPS, runs, 0, RUNS, &outcome)
                              : tapfs_map(disk, at, size - at, LOOKUPS, runs, 0, RUNS, &outcome);
        uint64_t next = at;
        for (size_t i = 0; i < count; i++) {
            HOLD(runs[i].offset == next && runs[i].length > 0);
            HOLD(runs[i].kind != TAPFS_DATA || format->layout.bitmap.where != TAPFS_BITMAP_NONE ||
                 (runs[i].placed && runs[i].host_offset < file_size));
            HOLD(runs[i].kind != TAPFS_DATA || !format->layout.data_whole ||
                 runs[i].length <= file_size - runs[i].host_offset);
            next += runs[i].length;
        }
        HOLD(next == at + outcome.done && next <= size);
        at = next;
        if (outcome.status == TAPFS_MISS) {
            supply(disk, &outcome, format->block * format->unit_blocks, size);
        } else {
            HOLD(outcome.status == TAPFS_DONE);
        }
    }
}

/* Read or write all that can be, in steps that go on behind what cannot. */
static void move_all(tapfs_disk *disk, const struct format *format, uint64_t size, bool writing)
{
    tapfs_outcome outcome;

    for (uint64_t at = 0; at < size;) {
        uint64_t length = size - at;
        uint8_t *buffer = malloc(length);
        HOLD(buffer != NULL);
        memset(buffer, 0xa5, length);
        if (writing) {
            tapfs_write(disk, buffer, at, length, 0, &outcome);
        } else {
            tapfs_read(disk, buffer, at, length, 0, &outcome);
        }
        free(buffer);
        HOLD(outcome.done <= length);
        at += outcome.done;
        if (outcome.status == TAPFS_MISS) {
            supply(disk, &outcome, format->block * format->unit_blocks, size);
        } else if (outcome.status == TAPFS_RESERVE) {
            HOLD(writing && outcome.offset == at && outcome.length > 0);
            at += outcome.length;
        } else if (outcome.status == TAPFS_FAILED) {
            HOLD(outcome.error > 0 && outcome.operation != NULL);
            at += format->granule - at % format->granule;
        } else {
            HOLD(outcome.status == TAPFS_DONE && at == size);
        }
    }
}

/* The metadata that was named is as it was. */
static void compare(uint64_t reserved_end)
{
    static uint8_t now[DATA_AT];
    HOLD(pread(file, now, reserved_end, 0) == (ssize_t)reserved_end);
    HOLD(memcmp(now, content, reserved_end) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    const struct format *format = &formats[take_byte(&input) % (sizeof formats / sizeof formats[0])];
    uint8_t flags = take_byte(&input);
    uint64_t file_size = DATA_AT + take_byte(&input) * (FILE_MAX - DATA_AT) / 255;
    uint64_t unit = format->block * format->unit_blocks, disk_size = UNITS * unit - take_byte(&input) % 64 * format->granule;
    uint64_t entry = format->layout.entry_bytes + (format->layout.bitmap.where == TAPFS_BITMAP_IN_ENTRY ? 8 : 0);
    uint64_t places[UNITS];
    tapfs_table layout = format->layout;

    for (uint32_t i = 0; i < UNITS; i++) {
        uint8_t word = take_byte(&input);
        uint64_t blocks = i * format->unit_blocks, words = layout.bitmap.where == TAPFS_BITMAP_IN_TABLE ? blocks / 4 : 0;
        places[i] = word == 0xff ? TAPFS_TABLE_ABSENT : word == 0xfe ? TAPFS_TABLE_ASK : word == 0xfd ? take_number(&input)
                    : TABLES_AT + (blocks + words) * entry;
    }
    memcpy(content, pattern, sizeof content);
    take_bytes(&input, content + TABLES_AT, input.left < FILE_MAX - TABLES_AT ? input.left : FILE_MAX - TABLES_AT);
    HOLD(ftruncate(file, 0) == 0 && pwrite(file, content, file_size, 0) == (ssize_t)file_size);
    layout.host_size = file_size;
    layout.reserved_end[0] = DATA_AT;
    layout.tables_reserved = 1;
    layout.flagged_places = flags & 1;
    layout.zeros_keep_places = flags >> 4 & 1;
    tapfs_layer layer = {
        .virtual_size = disk_size,
        .granule = format->granule,
        .packed_unit = format->codec == TAPFS_CODEC_NONE ? 0 : format->block,
        .map_unit = unit,
        .writable = 1,
        .packing = {.codec = format->codec},
    };
    if (layout.packed_bound != 0) {
        layer.packing.header_bytes = 12;
        layer.packing.length_at = 8;
        layer.packing.length_bytes = 4;
    }
    tapfs_disk *disk = tapfs_disk_new(flags & 2 ? 1500 : 1 << 20);
    HOLD(disk != NULL && tapfs_disk_add_layer(disk, &layer) == 0);
    HOLD(tapfs_disk_add_file(disk, 0, file, TAPFS_FILE_WRITABLE) == 0);
    HOLD(tapfs_disk_set_tables(disk, 0, &layout, places, UNITS - (UNITS * unit - disk_size) / unit) == 0);
    if (flags & 4) {
        map_all(disk, format, disk_size, file_size, (flags & 16) != 0);
    }
    move_all(disk, format, disk_size, false);
    if (flags & 8) {
        move_all(disk, format, disk_size, true);
        compare(DATA_AT);
        move_all(disk, format, disk_size, false);
    }
    tapfs_disk_free(disk);
    return 0;
}
