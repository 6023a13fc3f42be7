/*
 * Threads that miss maps read tables at the same time, and tables that lie together are read together in a scan.
 * Linked with --wrap=pread: a read of a table waits until another thread reads one, too, so a lock that were held across
 * it would stop the program (alarm).
 * usage: table_threads FILE CASE; "ok" and 0, or a message and 1.
 * CASE: 0, different units; 1, the same unit; 2, a parent's units below an empty top; 3, a scan in order; 4, backwards.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
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

enum { GRANULE = 512, ENTRIES = 64, UNIT = GRANULE * ENTRIES, TABLE_BYTES = 8 * ENTRIES, UNITS = 64 };
enum { TABLES = 512, DATA = TABLES + UNITS * TABLE_BYTES, END = DATA + UNITS * GRANULE };
enum { DIFFERENT, SAME, PARENT, SCAN, BACKWARDS };

static tapfs_disk *disk;
static pthread_barrier_t both;
static atomic_bool waiting;
static atomic_int table_reads;

ssize_t __real_pread(int file, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pread(int file, void *buffer, size_t length, off_t offset);

ssize_t __wrap_pread(int file, void *buffer, size_t length, off_t offset)
{
    if (offset >= TABLES && offset < DATA) {
        atomic_fetch_add(&table_reads, 1);
        if (atomic_load(&waiting)) {
            pthread_barrier_wait(&both);
        }
    }
    return __real_pread(file, buffer, length, offset);
}

static void read_unit(uint64_t unit)
{
    uint8_t found[GRANULE];
    tapfs_outcome outcome;
    tapfs_read(disk, found, unit * UNIT, GRANULE, 0, &outcome);
    REQUIRE(outcome.status == TAPFS_DONE && outcome.done == GRANULE && found[0] == unit + 1);
}

static void *reader(void *unit)
{
    read_unit((uintptr_t)unit);
    return NULL;
}

static void write_image(int fd)
{
    REQUIRE(ftruncate(fd, END) == 0);
    for (uint64_t unit = 0; unit < UNITS; unit++) {
        uint64_t words[ENTRIES] = {DATA + unit * GRANULE};
        uint8_t byte = (uint8_t)(unit + 1);
        REQUIRE(pwrite(fd, words, sizeof words, (off_t)(TABLES + unit * TABLE_BYTES)) == (ssize_t)sizeof words);
        REQUIRE(pwrite(fd, &byte, 1, (off_t)words[0]) == 1);
    }
}

static void add_layer(int fd, const uint64_t *places)
{
    const tapfs_layer geometry = {.virtual_size = UNITS * UNIT, .granule = GRANULE, .map_unit = UNIT};
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
    int layer = tapfs_disk_add_layer(disk, &geometry);
    REQUIRE(layer >= 0 && tapfs_disk_add_file(disk, (uint32_t)layer, fd, 0) == 0);
    REQUIRE(tapfs_disk_set_tables(disk, (uint32_t)layer, &layout, places, UNITS) == 0);
}

int main(int argc, char **argv)
{
    uint64_t places[UNITS];
    const uint64_t nothing[UNITS] = {TAPFS_TABLE_ABSENT};

    REQUIRE(argc == 3);
    int what = atoi(argv[2]);
    alarm(60);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    REQUIRE(fd >= 0);
    write_image(fd);
    for (uint64_t unit = 0; unit < UNITS; unit++) {
        places[unit] = TABLES + unit * TABLE_BYTES;
    }
    disk = tapfs_disk_new(1 << 20);
    REQUIRE(disk != NULL);
    if (what == PARENT) {
        add_layer(fd, nothing);
    }
    add_layer(fd, places);
    if (what == SCAN || what == BACKWARDS) {
        for (uint64_t i = 0; i < UNITS; i++) {
            read_unit(what == SCAN ? i : UNITS - 1 - i);
        }
        REQUIRE(what == SCAN ? atomic_load(&table_reads) <= 8 : atomic_load(&table_reads) == UNITS);
    } else {
        pthread_t threads[2];
        pthread_barrier_init(&both, NULL, 2);
        atomic_store(&waiting, true);
        for (uintptr_t i = 0; i < 2; i++) {
            REQUIRE(pthread_create(&threads[i], NULL, reader, (void *)(what == SAME ? 7 : 7 + 20 * i)) == 0);
        }
        for (size_t i = 0; i < 2; i++) {
            REQUIRE(pthread_join(threads[i], NULL) == 0);
        }
        REQUIRE(atomic_load(&table_reads) == 2);
    }
    tapfs_disk_free(disk);
    close(fd);
    puts("ok");
    return 0;
}
