/*
 * A disk for the mover's driver, and what it must read like: three layers over host files in a folder, a flat
 * model in memory, and an owner of the maps that serves MISS and RESERVE.
 *
 *   0  mapped, writable, two files: in place, shared (not in place), compressed, zero and unallocated granules
 *   1  mapped, shorter than the disk, its file shorter than its map
 *   2  an identity of odd length
 */
#ifndef MOVER_WORLD_H
#define MOVER_WORLD_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/bytes.h"
#include "mover/mover.h"

#define GRANULE 4096u
#define UNIT (16 * GRANULE)
#define SIZE (16 * UNIT)
#define GRANULES (SIZE / GRANULE)
#define SLOTS (2 * GRANULES)
#define MIDDLE_SIZE (SIZE - 10000)
#define BOTTOM_SIZE 700001u
#define DEPTH 24u

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __FILE__, __LINE__))

static inline void die(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s:%d: %s (errno %d)\n", file, line, what, errno);
    exit(1);
}

struct options {
    const char *folder;
    enum mover_ring ring;
    bool direct, cipher;
    unsigned seed;
};

struct world {
    struct options options;
    tapfs_disk *disk;
    struct mover *mover;
    int files[2], middle, bottom;
    tapfs_extent top[GRANULES], below[GRANULES];
    bool taken[2][SLOTS];
    uint8_t model[SIZE];
    pthread_mutex_t map_lock;
};

static inline uint32_t chance(unsigned *seed, uint32_t below)
{
    return (uint32_t)rand_r(seed) % below;
}

static inline void fill(unsigned *seed, uint8_t *bytes, size_t length)
{
    unsigned value = (unsigned)rand_r(seed);
    for (size_t i = 0; i < length; i++) {
        bytes[i] = (uint8_t)((value + i * 7 + i / 251) % 255 + 1);
    }
}

static inline int open_file(const struct world *world, const char *name, bool direct)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", world->options.folder, name);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | (direct ? O_DIRECT : 0), 0600);
    if (fd < 0 && direct && errno == EINVAL) {
        fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    }
    REQUIRE(fd >= 0);
    return fd;
}

/* Straight to the host file, whatever the flags of the disk's own descriptor are. */
static inline void put(const struct world *world, const char *name, const void *bytes, size_t length, uint64_t offset)
{
    int fd = open_file(world, name, false);
    REQUIRE(pwrite(fd, bytes, length, (off_t)offset) == (ssize_t)length);
    close(fd);
}

static inline const char *file_name(uint32_t file)
{
    return file == 0 ? "top-0" : "top-1";
}

static inline uint64_t take_slot(struct world *world, unsigned *seed, uint32_t file)
{
    uint32_t slot = chance(seed, SLOTS);
    while (world->taken[file][slot]) {
        slot = (slot + 1) % SLOTS;
    }
    world->taken[file][slot] = true;
    return (uint64_t)slot * GRANULE;
}

static inline void make_bottom(struct world *world, unsigned *seed)
{
    fill(seed, world->model, BOTTOM_SIZE);
    put(world, "bottom", world->model, BOTTOM_SIZE, 0);
}

static inline void make_middle(struct world *world, unsigned *seed)
{
    uint8_t bytes[GRANULE];
    for (uint32_t i = 0; i < GRANULES; i++) {
        uint64_t offset = (uint64_t)i * GRANULE;
        tapfs_extent *extent = &world->below[i];
        size_t inside = offset < MIDDLE_SIZE ? minimum(GRANULE, MIDDLE_SIZE - offset) : 0;
        *extent = (tapfs_extent){.offset = offset, .length = GRANULE, .kind = TAPFS_UNALLOCATED};
        switch (chance(seed, 5)) {
        case 0:
        case 1:
            /* Sometimes the granule before it goes on here, and a third of the map lies past the file's end. */
            extent->kind = TAPFS_DATA;
            extent->host_offset = offset * 3 / 2 / GRANULE * GRANULE;
            if (extent->host_offset < SIZE) {
                fill(seed, bytes, GRANULE);
                put(world, "middle", bytes, GRANULE, extent->host_offset);
            } else {
                memset(bytes, 0, GRANULE);
            }
            memcpy(world->model + offset, bytes, inside);
            break;
        case 2:
            extent->kind = TAPFS_ZERO;
            memset(world->model + offset, 0, inside);
            break;
        default:
            break;
        }
        memset(world->model + offset + inside, 0, GRANULE - inside);
    }
}

static inline void make_top(struct world *world, unsigned *seed)
{
    static uint8_t bytes[GRANULE], payload[GRANULE];
    uint64_t size;

    for (uint32_t i = 0; i < GRANULES; i++) {
        uint64_t offset = (uint64_t)i * GRANULE;
        tapfs_extent *extent = &world->top[i];
        uint32_t kind = chance(seed, 8);
        *extent = (tapfs_extent){.offset = offset, .length = GRANULE, .kind = TAPFS_UNALLOCATED};
        if (kind == 0) {
            extent->kind = TAPFS_ZERO;
            memset(world->model + offset, 0, GRANULE);
        } else if (kind == 1) {
            extent->kind = TAPFS_COMPRESSED;
            extent->file = chance(seed, 2);
            extent->host_offset = take_slot(world, seed, extent->file) + 100;
            fill(seed, bytes, GRANULE);
            REQUIRE(tapfs_compress(TAPFS_CODEC_RAW_DEFLATE, bytes, GRANULE, 1, payload, &size) == 0 && size > 0);
            extent->host_length = size;
            put(world, file_name(extent->file), payload, size, extent->host_offset);
            memcpy(world->model + offset, bytes, GRANULE);
        } else if (kind < 5 && !world->options.cipher) {
            extent->kind = TAPFS_DATA;
            extent->in_place = kind != 2;
            extent->file = chance(seed, 2);
            extent->host_offset = take_slot(world, seed, extent->file);
            fill(seed, bytes, GRANULE);
            put(world, file_name(extent->file), bytes, GRANULE, extent->host_offset);
            memcpy(world->model + offset, bytes, GRANULE);
        }
    }
}

/* Under the map lock. */
static inline void supply_map(struct world *world, uint32_t layer, uint64_t offset)
{
    const tapfs_extent *map = layer == 0 ? world->top : world->below;
    REQUIRE(tapfs_disk_install(world->disk, layer, &map[offset / UNIT * (UNIT / GRANULE)], UNIT / GRANULE) == 0);
}

/* Give the first granule of what needs a place one, and write what the move has for it. Under the map lock. */
static inline void give_place(struct world *world, unsigned *seed, struct move *move)
{
    uint64_t at = move->outcome.offset, granule = at / GRANULE * GRANULE;
    uint64_t length = minimum(granule + GRANULE, move->offset + move->length) - at;
    tapfs_extent *extent = &world->top[granule / GRANULE];
    uint64_t done = move->outcome.done;
    uint8_t bytes[GRANULE];
    uint64_t skip = done, copied = 0;
    tapfs_outcome outcome;

    REQUIRE(at == move->offset + done);
    for (uint32_t i = 0; i < move->part_count && copied < length; i++) {
        uint64_t size = move->parts[i].iov_len;
        if (skip < size) {
            uint64_t count = minimum(size - skip, length - copied);
            memcpy(bytes + copied, (uint8_t *)move->parts[i].iov_base + skip, count);
            copied += count;
            skip = 0;
        } else {
            skip -= size;
        }
    }
    uint32_t file = chance(seed, 2);
    tapfs_placement place = {
        .offset = granule, .length = GRANULE, .file = file, .host_offset = take_slot(world, seed, file)};
    tapfs_segment segment = {.offset = at, .length = length, .data = bytes};
    tapfs_range range = {.offset = granule, .length = GRANULE};
    do {
        tapfs_write_reserved(world->disk, &segment, 1, &range, 1, &place, 1, 0, &outcome);
        if (outcome.status == TAPFS_MISS) {
            supply_map(world, outcome.layer, outcome.offset);
        }
    } while (outcome.status == TAPFS_MISS);
    REQUIRE(outcome.status == TAPFS_DONE);
    *extent = (tapfs_extent){.offset = granule, .length = GRANULE, .kind = TAPFS_DATA, .in_place = 1, .file = file,
                             .host_offset = place.host_offset};
    REQUIRE(tapfs_disk_patch(world->disk, 0, extent, 1) == 0);
    move->outcome.done = done + length;
}

static inline void world_open(struct world *world, const struct options *options)
{
    static const uint8_t key[16] = "sixteen bytes...";
    unsigned seed = options->seed;

    *world = (struct world){.options = *options};
    pthread_mutex_init(&world->map_lock, NULL);
    make_bottom(world, &seed);
    make_middle(world, &seed);
    make_top(world, &seed);
    world->disk = tapfs_disk_new(1 << 20);
    tapfs_layer top = {
        .virtual_size = SIZE, .granule = GRANULE, .map_unit = UNIT, .packing = {.codec = TAPFS_CODEC_RAW_DEFLATE}, .writable = 1};
    if (options->cipher) {
        top.cipher = (tapfs_cipher){
            .algorithm = TAPFS_CIPHER_AES,
            .mode = TAPFS_CIPHER_CBC,
            .iv = TAPFS_IV_PLAIN64,
            .key_bytes = sizeof key,
            .sector_bytes = 512,
            .iv_bytes = 512};
        memcpy(top.cipher.key, key, sizeof key);
    }
    tapfs_layer middle = {.virtual_size = MIDDLE_SIZE, .granule = GRANULE, .map_unit = UNIT};
    tapfs_layer bottom = {.virtual_size = BOTTOM_SIZE, .identity = 1};
    uint32_t flags = options->direct ? TAPFS_FILE_DIRECT : 0;
    REQUIRE(tapfs_disk_add_layer(world->disk, &top) == 0);
    for (uint32_t i = 0; i < 2; i++) {
        world->files[i] = open_file(world, file_name(i), options->direct);
        REQUIRE(tapfs_disk_add_file(world->disk, 0, world->files[i], flags | TAPFS_FILE_WRITABLE) == (int)i);
    }
    REQUIRE(tapfs_disk_add_layer(world->disk, &middle) == 1);
    world->middle = open_file(world, "middle", options->direct);
    REQUIRE(tapfs_disk_add_file(world->disk, 1, world->middle, flags) == 0);
    REQUIRE(tapfs_disk_add_layer(world->disk, &bottom) == 2);
    world->bottom = open_file(world, "bottom", options->direct);
    REQUIRE(tapfs_disk_add_file(world->disk, 2, world->bottom, flags) == 0);
    world->mover = mover_new(world->disk, DEPTH, 2, options->ring);
    REQUIRE(world->mover != NULL);
}

static inline void world_close(struct world *world)
{
    mover_free(world->mover);
    tapfs_disk_free(world->disk);
    close(world->files[0]);
    close(world->files[1]);
    close(world->middle);
    close(world->bottom);
    pthread_mutex_destroy(&world->map_lock);
}

/* Let the host forget what it has in memory, so that reads wait. */
static inline void cool(const struct world *world)
{
    const int all[] = {world->files[0], world->files[1], world->middle, world->bottom};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        fdatasync(all[i]);
        posix_fadvise(all[i], 0, 0, POSIX_FADV_DONTNEED);
    }
}

/* The moves that have ended, at least one. */
static inline struct move *wait_ended(struct mover *mover)
{
    for (;;) {
        struct pollfd ready = {.fd = mover_fd(mover), .events = POLLIN};
        int count = poll(&ready, 1, 60000);
        REQUIRE(count == 1 || (count < 0 && errno == EINTR));
        struct move *ended = mover_ended(mover);
        if (ended != NULL) {
            return ended;
        }
    }
}

/* Until it is finished or has failed, alone in flight. */
static inline void run_alone(struct mover *mover, struct move *move)
{
    if (!mover_begin(mover, move)) {
        mover_submit(mover);
        struct move *ended = wait_ended(mover);
        REQUIRE(ended == move && ended->next == NULL);
    }
    REQUIRE(mover_in_flight(mover) == 0);
}

static inline void require_idle(struct mover *mover)
{
    struct pollfd ready = {.fd = mover_fd(mover), .events = POLLIN};
    REQUIRE(mover_in_flight(mover) == 0 && mover_ended(mover) == NULL);
    REQUIRE(poll(&ready, 1, 0) == 0);
}

#endif
