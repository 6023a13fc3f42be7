/*
 * A table is read while its unit is committed to and flushed: the bytes from before must not reach the cache.
 * Linked with --wrap=pread, so that the change comes between the read of the table and its entry in the cache, every
 * time. usage: table_race FILE CASE; "ok" and 0, or a message and 1. CASE: the number of a change below.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"

#define REQUIRE(condition)                                                                                            \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            printf("line %d: %s\n", __LINE__, #condition);                                                            \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

enum { GRANULE = 512, ENTRIES = 64, UNIT = GRANULE * ENTRIES, TABLE = 512, OLD = 1024, NEW = 2048, END = 4096 };

static tapfs_disk *disk;
static int fd;
static int change;
static int changes;

ssize_t __real_pread(int file, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pread(int file, void *buffer, size_t length, off_t offset);

static void set_entry(uint64_t value)
{
    uint64_t words[ENTRIES] = {value};
    REQUIRE(pwrite(fd, words, sizeof words, TABLE) == (ssize_t)sizeof words);
}

/* The first granule moves from OLD to NEW: committed (the cache is told), flushed, and the place is said again. */
static void move_granule(void)
{
    const tapfs_extent there = {.length = GRANULE, .host_offset = NEW, .kind = TAPFS_DATA};
    const uint64_t place = TABLE;

    if (change == 0) {
        REQUIRE(tapfs_disk_patch(disk, 0, &there, 1) == 0);
    } else {
        tapfs_disk_forget(disk, 0, 0, GRANULE);
    }
    if (change != 2) {
        set_entry(NEW);
        REQUIRE(tapfs_disk_set_places(disk, 0, 0, &place, 1, END) == 0);
    }
}

ssize_t __wrap_pread(int file, void *buffer, size_t length, off_t offset)
{
    ssize_t count = __real_pread(file, buffer, length, offset);
    if (offset == TABLE && changes == 0) {
        changes++;
        move_granule();
    }
    return count;
}

int main(int argc, char **argv)
{
    const tapfs_layer geometry = {.virtual_size = UNIT, .granule = GRANULE, .map_unit = UNIT, .writable = 1};
    const tapfs_table layout = {
        .entry_bytes = 8,
        .entry_granules = 1,
        .absent_kind = TAPFS_UNALLOCATED,
        .rule_count = 1,
        .rules = {{.mask = UINT64_MAX, .value = 0, .kind = TAPFS_UNALLOCATED}},
        .host_size = END,
        .table_alignment = 1,
        .place_alignment = 1,
        .place_mask = INT64_MAX,
        .place_multiplier = 1,
    };
    const uint64_t place = TABLE;
    uint8_t bytes[GRANULE], found[GRANULE];
    tapfs_outcome outcome;

    REQUIRE(argc == 3);
    change = atoi(argv[2]);
    fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    REQUIRE(fd >= 0 && ftruncate(fd, END) == 0);
    memset(bytes, 'o', sizeof bytes);
    REQUIRE(pwrite(fd, bytes, sizeof bytes, OLD) == (ssize_t)sizeof bytes);
    memset(bytes, 'n', sizeof bytes);
    REQUIRE(pwrite(fd, bytes, sizeof bytes, NEW) == (ssize_t)sizeof bytes);
    set_entry(OLD);
    disk = tapfs_disk_new(1 << 20);
    REQUIRE(disk != NULL && tapfs_disk_add_layer(disk, &geometry) == 0);
    REQUIRE(tapfs_disk_add_file(disk, 0, fd, TAPFS_FILE_WRITABLE) == 0);
    REQUIRE(tapfs_disk_set_tables(disk, 0, &layout, &place, 1) == 0);

    tapfs_read(disk, found, 0, GRANULE, 0, &outcome);
    REQUIRE(changes == 1);
    if (change == 2) {
        /* Not flushed yet: only the owner knows. */
        REQUIRE(outcome.status == TAPFS_MISS && outcome.done == 0);
    } else {
        REQUIRE(outcome.status == TAPFS_DONE && outcome.done == GRANULE);
        REQUIRE(memcmp(found, bytes, GRANULE) == 0);
    }
    tapfs_disk_free(disk);
    close(fd);
    puts("ok");
    return 0;
}
