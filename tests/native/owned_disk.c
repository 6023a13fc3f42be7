/* The disks of owned_disk.h and their owner. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "owned_disk.h"

#define HOST_START GRANULE

tapfs_disk *disk;
static int host_file;
static pthread_mutex_t map_lock = PTHREAD_MUTEX_INITIALIZER;
static bool allocated[SIZE / GRANULE];

void die(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s, line %d: %s (errno %d)\n", file, line, what, errno);
    exit(1);
}

uint8_t byte_at(uint64_t offset)
{
    return (uint8_t)(offset * 31 / 7 % 251 + 1);
}

static void supply_map(tapfs_disk *of, uint64_t offset)
{
    uint64_t start = offset - offset % UNIT;
    tapfs_extent extents[UNIT / GRANULE];
    for (uint64_t i = 0; i < UNIT / GRANULE; i++) {
        bool here = allocated[start / GRANULE + i];
        extents[i] = (tapfs_extent){
            .offset = start + i * GRANULE,
            .length = GRANULE,
            .host_offset = here ? HOST_START + start + i * GRANULE : 0,
            .kind = here ? TAPFS_DATA : TAPFS_UNALLOCATED,
            .in_place = here,
        };
    }
    REQUIRE(tapfs_disk_install(of, 0, extents, UNIT / GRANULE) == 0);
}

/* The first granule of what has no place yet. Fills, then commits, all under the lock: a simple owner. */
static void give_place(tapfs_disk *of, const tapfs_parked *parked)
{
    uint64_t at = parked->outcome.offset;
    uint64_t granule = at - at % GRANULE;
    uint64_t end = parked->offset + parked->length;
    uint64_t length = (granule + GRANULE < end ? granule + GRANULE : end) - at;
    if (allocated[granule / GRANULE]) {
        tapfs_disk_forget(of, 0, granule, GRANULE); /* another owner was quicker, maybe by another disk */
        return;
    }
    tapfs_placement place = {.offset = granule, .length = GRANULE, .host_offset = HOST_START + granule, .fresh = 1};
    tapfs_segment segment = {.offset = at, .length = length, .data = parked->data + (at - parked->offset)};
    tapfs_range range = {.offset = granule, .length = GRANULE};
    tapfs_outcome outcome;
    do {
        tapfs_write_reserved(of, &segment, 1, &range, 1, &place, 1, 0, &outcome);
        if (outcome.status == TAPFS_MISS) {
            supply_map(of, outcome.offset);
        }
    } while (outcome.status == TAPFS_MISS);
    REQUIRE(outcome.status == TAPFS_DONE);
    allocated[granule / GRANULE] = true;
    tapfs_extent now = {
        .offset = granule, .length = GRANULE, .host_offset = HOST_START + granule, .kind = TAPFS_DATA, .in_place = 1};
    REQUIRE(tapfs_disk_patch(of, 0, &now, 1) == 0);
}

void give_what_is_missing(tapfs_disk *of, const tapfs_parked *parked)
{
    pthread_mutex_lock(&map_lock);
    if (parked->outcome.status == TAPFS_MISS) {
        supply_map(of, parked->outcome.offset);
    } else {
        REQUIRE(parked->outcome.status == TAPFS_RESERVE);
        give_place(of, parked);
    }
    pthread_mutex_unlock(&map_lock);
}

void forget_map(tapfs_disk *of, uint64_t offset, uint64_t length)
{
    pthread_mutex_lock(&map_lock);
    tapfs_disk_forget(of, 0, offset, length);
    pthread_mutex_unlock(&map_lock);
}

void disturb_disk(unsigned *seed)
{
    tapfs_statistics counters;
    tapfs_outcome outcome;
    tapfs_step step = {.step = TAPFS_STEP_GROW, .host_offset = HOST_START + SIZE};

    forget_map(disk, (uint64_t)rand_r(seed) % SIZE, GRANULE);
    tapfs_execute(disk, &step, 1, &outcome);
    tapfs_disk_quiesce(disk);
    tapfs_disk_statistics(disk, &counters);
}

tapfs_disk *owned_disk_again(void)
{
    tapfs_layer layer = {.virtual_size = SIZE, .granule = GRANULE, .map_unit = UNIT, .writable = 1};
    /* Room for fewer units than there are, so that they come and go. */
    tapfs_disk *made = tapfs_disk_new(1500);

    REQUIRE(made != NULL && tapfs_disk_add_layer(made, &layer) == 0);
    REQUIRE(tapfs_disk_add_file(made, 0, host_file, TAPFS_FILE_WRITABLE) == 0);
    return made;
}

void owned_disk_open(const char *path)
{
    host_file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    REQUIRE(host_file >= 0);
    disk = owned_disk_again();
}

void owned_disk_close(void)
{
    uint8_t *content = calloc(1, SIZE);
    REQUIRE(pread(host_file, content, SIZE, HOST_START) >= 0);
    for (uint64_t i = 0; i < SIZE; i++) {
        REQUIRE(content[i] == 0 || content[i] == byte_at(i));
    }
    free(content);
    tapfs_disk_free(disk);
    close(host_file);
}
