/*
 * The map of a chain is merged while the top layer is committed to: the map from before must not reach the cache.
 * Linked with --wrap=pread, so that the commit comes when the parent's table is read, after the top's map was looked at.
 * usage: merged_race FILE CASE; "ok" and 0, or a message and 1. CASE: 0, the commit patches the top's map; 1, it forgets
 * and installs it.
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
static int change;
static int armed;
static int changes;

ssize_t __real_pread(int file, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pread(int file, void *buffer, size_t length, off_t offset);

static const tapfs_extent nothing = {.length = UNIT, .kind = TAPFS_UNALLOCATED};
static const tapfs_extent written[] = {
    {.length = GRANULE, .host_offset = NEW, .kind = TAPFS_DATA},
    {.offset = GRANULE, .length = UNIT - GRANULE, .kind = TAPFS_UNALLOCATED},
};

ssize_t __wrap_pread(int file, void *buffer, size_t length, off_t offset)
{
    ssize_t count = __real_pread(file, buffer, length, offset);
    if (offset == TABLE && armed) {
        armed = 0;
        changes++;
        if (change == 0) {
            REQUIRE(tapfs_disk_patch(disk, 0, &written[0], 1) == 0);
        } else {
            tapfs_disk_forget(disk, 0, 0, GRANULE);
            REQUIRE(tapfs_disk_install(disk, 0, written, 2) == 0);
        }
    }
    return count;
}

static uint8_t first_byte(void)
{
    uint8_t found[GRANULE];
    tapfs_outcome outcome;
    tapfs_read(disk, found, 0, GRANULE, 0, &outcome);
    REQUIRE(outcome.status == TAPFS_DONE && outcome.done == GRANULE);
    return found[0];
}

int main(int argc, char **argv)
{
    const tapfs_layer top = {.virtual_size = UNIT, .granule = GRANULE, .map_unit = UNIT, .writable = 1};
    const tapfs_layer parent = {.virtual_size = UNIT, .granule = GRANULE, .map_unit = UNIT};
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
    const uint64_t words[ENTRIES] = {OLD};
    uint8_t bytes[GRANULE];

    REQUIRE(argc == 3);
    change = atoi(argv[2]);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    REQUIRE(fd >= 0 && ftruncate(fd, END) == 0);
    REQUIRE(pwrite(fd, words, sizeof words, TABLE) == (ssize_t)sizeof words);
    memset(bytes, 'o', sizeof bytes);
    REQUIRE(pwrite(fd, bytes, sizeof bytes, OLD) == (ssize_t)sizeof bytes);
    memset(bytes, 'n', sizeof bytes);
    REQUIRE(pwrite(fd, bytes, sizeof bytes, NEW) == (ssize_t)sizeof bytes);
    disk = tapfs_disk_new(1 << 20);
    REQUIRE(disk != NULL && tapfs_disk_add_layer(disk, &top) == 0 && tapfs_disk_add_layer(disk, &parent) == 1);
    REQUIRE(tapfs_disk_add_file(disk, 0, fd, TAPFS_FILE_WRITABLE) == 0 && tapfs_disk_add_file(disk, 1, fd, 0) == 0);
    REQUIRE(tapfs_disk_set_tables(disk, 1, &layout, &place, 1) == 0);
    REQUIRE(tapfs_disk_install(disk, 0, &nothing, 1) == 0);

    /* The top's map is in the cache, so the first read merges, and needs the parent's table for it. */
    armed = 1;
    first_byte();
    REQUIRE(changes == 1);
    REQUIRE(first_byte() == 'n');
    REQUIRE(first_byte() == 'n');
    tapfs_disk_free(disk);
    close(fd);
    puts("ok");
    return 0;
}
