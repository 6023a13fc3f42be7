/* Scenarios of the mover's driver: beside threads that work on the same disk, and what it leaves behind. */
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "mover_driver.h"

/* ---- beside who moves granules to other places and uses the old ones again */

#define RELOCATIONS 250
#define OLD_PLACES 8

static atomic_bool over;
static int plain; /* a descriptor of the host file without O_DIRECT */
static uint8_t granule_bytes[GRANULE], poison[GRANULE];

/* Every byte of a granule tells its offset; what lies in a place that was given up is poison. */
static uint8_t byte_at(uint64_t offset)
{
    return (uint8_t)(offset / GRANULE * 31 % 251 + 1);
}

static void require_poison(uint64_t place)
{
    uint8_t bytes[GRANULE];
    REQUIRE(pread(plain, bytes, GRANULE, (off_t)place) == GRANULE);
    REQUIRE(memcmp(bytes, poison, GRANULE) == 0);
}

static void *relocate(void *argument)
{
    unsigned mine = *(unsigned *)argument;
    uint64_t old_places[OLD_PLACES];

    for (unsigned i = 0; i < RELOCATIONS; i++) {
        tapfs_extent *extent = &world.top[chance(&mine, GRANULES)];
        pthread_mutex_lock(&world.map_lock);
        uint64_t old = extent->host_offset, fresh = take_slot(&world, &mine, 0);
        memset(granule_bytes, byte_at(extent->offset), GRANULE);
        REQUIRE(pwrite(plain, granule_bytes, GRANULE, (off_t)fresh) == GRANULE);
        extent->host_offset = fresh;
        REQUIRE(tapfs_disk_patch(world.disk, 0, extent, 1) == 0);
        pthread_mutex_unlock(&world.map_lock);
        tapfs_disk_quiesce(world.disk);
        /* Nobody reads the old place any more, and nobody writes to it. */
        REQUIRE(pwrite(plain, poison, GRANULE, (off_t)old) == GRANULE);
        if (i >= OLD_PLACES) {
            require_poison(old_places[i % OLD_PLACES]);
            world.taken[0][old_places[i % OLD_PLACES] / GRANULE] = false;
        }
        old_places[i % OLD_PLACES] = old;
    }
    atomic_store(&over, true);
    return NULL;
}

static void open_granules(const struct options *options)
{
    world.options = *options;
    pthread_mutex_init(&world.map_lock, NULL);
    memset(poison, 0xff, sizeof poison);
    plain = open_file(&world, "granules", false);
    REQUIRE(ftruncate(plain, SLOTS * GRANULE) == 0);
    for (uint32_t i = 0; i < GRANULES; i++) {
        uint64_t offset = (uint64_t)i * GRANULE;
        world.top[i] = (tapfs_extent){.offset = offset, .length = GRANULE, .kind = TAPFS_DATA, .in_place = 1,
                                      .host_offset = take_slot(&world, &seed, 0)};
        memset(granule_bytes, byte_at(offset), GRANULE);
        REQUIRE(pwrite(plain, granule_bytes, GRANULE, (off_t)world.top[i].host_offset) == GRANULE);
    }
    REQUIRE(fsync(plain) == 0);
    tapfs_layer layer = {.virtual_size = SIZE, .granule = GRANULE, .map_unit = UNIT, .writable = 1};
    world.disk = tapfs_disk_new(1 << 20);
    REQUIRE(tapfs_disk_add_layer(world.disk, &layer) == 0);
    world.files[0] = open_file(&world, "granules", options->direct);
    uint32_t flags = TAPFS_FILE_WRITABLE | (options->direct ? TAPFS_FILE_DIRECT : 0);
    REQUIRE(tapfs_disk_add_file(world.disk, 0, world.files[0], flags) == 0);
    world.mover = mover_new(world.disk, DEPTH, 2, options->ring);
    REQUIRE(world.mover != NULL);
}

static void require_granules(const struct slot *slot)
{
    uint64_t at = slot->move.offset;
    for (uint32_t i = 0; i < slot->move.part_count; i++) {
        const uint8_t *bytes = slot->parts[i].iov_base;
        for (uint64_t j = 0; j < slot->parts[i].iov_len; j++, at++) {
            REQUIRE(bytes[j] == byte_at(at));
        }
    }
}

static void tell_offsets(const struct slot *slot)
{
    uint64_t at = slot->move.offset;
    for (uint32_t i = 0; i < slot->move.part_count; i++) {
        uint8_t *bytes = slot->parts[i].iov_base;
        for (uint64_t j = 0; j < slot->parts[i].iov_len; j++, at++) {
            bytes[j] = byte_at(at);
        }
    }
}

/* False: it went on and is in flight. */
static bool finished(struct move *move)
{
    while (move->outcome.status == TAPFS_MISS) {
        pthread_mutex_lock(&world.map_lock);
        supply_map(&world, 0, move->outcome.offset);
        pthread_mutex_unlock(&world.map_lock);
        if (!mover_begin(world.mover, move)) {
            return false;
        }
    }
    REQUIRE(move->outcome.status == TAPFS_DONE && move->outcome.done == move->length);
    return true;
}

void check_quiesce(const struct options *options)
{
    unsigned theirs = seed + 1;
    pthread_t thread;

    open_granules(options);
    slots_open();
    REQUIRE(pthread_create(&thread, NULL, relocate, &theirs) == 0);
    while (!atomic_load(&over) || mover_in_flight(world.mover) > 0) {
        for (size_t i = 0; i < SLOT_COUNT && !atomic_load(&over); i++) {
            struct slot *slot = &slots[i];
            if (slot->busy) {
                continue;
            }
            choose(slot, chance(&seed, 4) == 0);
            tell_offsets(slot);
            slot->busy = !mover_begin(world.mover, &slot->move) || !finished(&slot->move);
            if (!slot->busy) {
                require_granules(slot);
            }
        }
        mover_submit(world.mover);
        if (mover_in_flight(world.mover) > 0) {
            for (struct move *move = wait_ended(world.mover), *next; move != NULL; move = next) {
                next = move->next;
                struct slot *slot = move->context;
                slot->busy = !finished(move);
                if (!slot->busy) {
                    require_granules(slot);
                }
            }
        }
        mover_submit(world.mover);
        if (chance(&seed, 4) == 0) {
            posix_fadvise(plain, 0, 0, POSIX_FADV_DONTNEED);
            tapfs_disk_forget(world.disk, 0, chance(&seed, SIZE), 1);
        }
    }
    pthread_join(thread, NULL);
    require_idle(world.mover);
    slots_close();
    mover_free(world.mover);
    tapfs_disk_free(world.disk);
    close(world.files[0]);
    close(plain);
}

/* ---- beside who writes other bytes of the same blocks of a file with O_DIRECT */

#define SECTOR 512u
#define PIECE 300u
#define SECTORS 64u

static uint8_t theirs_now[SECTORS][PIECE];

/* Pieces of the even sectors: the engine reads the block, changes it and writes it. */
static void *modify_blocks(void *argument)
{
    unsigned mine = *(unsigned *)argument;
    tapfs_outcome outcome;
    for (int i = 0; i < 1500; i++) {
        uint32_t sector = chance(&mine, SECTORS / 2) * 2;
        fill(&mine, theirs_now[sector], PIECE);
        tapfs_write(world.disk, theirs_now[sector], sector * SECTOR + 100, PIECE, 0, &outcome);
        REQUIRE(outcome.status == TAPFS_DONE);
    }
    atomic_store(&over, true);
    return NULL;
}

/* What a write has put into its block is not undone by who wrote beside it. */
static void require_kept(const struct move *move)
{
    static uint8_t block[DIRECT_ALIGNMENT] __attribute__((aligned(DIRECT_ALIGNMENT)));
    uint64_t inner = move->offset % sizeof block;
    REQUIRE(pread(world.files[0], block, sizeof block, (off_t)(move->offset - inner)) == sizeof block);
    REQUIRE(memcmp(block + inner, move->parts[0].iov_base, SECTOR) == 0);
}

void check_blocks(const struct options *options)
{
    static uint8_t ours_now[SECTORS * SECTOR], bytes[SECTORS * SECTOR];
    tapfs_layer layer = {.virtual_size = sizeof bytes, .identity = 1, .writable = 1};
    unsigned theirs = seed + 1;
    pthread_t thread;

    world.options = *options;
    world.disk = tapfs_disk_new(0);
    plain = open_file(&world, "blocks", false);
    REQUIRE(ftruncate(plain, sizeof bytes) == 0);
    world.files[0] = open_file(&world, "blocks", true);
    REQUIRE(tapfs_disk_add_layer(world.disk, &layer) == 0);
    REQUIRE(tapfs_disk_add_file(world.disk, 0, world.files[0], TAPFS_FILE_WRITABLE | TAPFS_FILE_DIRECT) == 0);
    world.mover = mover_new(world.disk, DEPTH, 2, options->ring);
    REQUIRE(world.mover != NULL);
    slots_open();
    REQUIRE(pthread_create(&thread, NULL, modify_blocks, &theirs) == 0);
    while (!atomic_load(&over) || mover_in_flight(world.mover) > 0) {
        /* The odd sectors, each of them in one slot only. */
        for (uint32_t i = 0; i < SLOT_COUNT && !atomic_load(&over); i++) {
            struct slot *slot = &slots[i];
            if (slot->busy) {
                continue;
            }
            uint64_t offset = (2 * i + 1) * SECTOR;
            fill(&seed, slot->memory, SECTOR);
            memcpy(ours_now + offset, slot->memory, SECTOR);
            slot->parts[0] = (struct iovec){.iov_base = slot->memory, .iov_len = SECTOR};
            slot->move = (struct move){.offset = offset, .length = SECTOR, .parts = slot->parts, .part_count = 1,
                                       .writing = true, .context = slot};
            slot->busy = !mover_begin(world.mover, &slot->move);
            REQUIRE(slot->busy || (slot->move.outcome.status == TAPFS_DONE && slot->move.outcome.done == SECTOR));
        }
        mover_submit(world.mover);
        struct move *ended = mover_in_flight(world.mover) > 0 ? wait_ended(world.mover) : NULL;
        for (struct move *move = ended; move != NULL; move = move->next) {
            REQUIRE(move->outcome.status == TAPFS_DONE && move->outcome.done == SECTOR);
            require_kept(move);
            ((struct slot *)move->context)->busy = false;
        }
    }
    pthread_join(thread, NULL);
    REQUIRE(pread(plain, bytes, sizeof bytes, 0) == sizeof bytes);
    for (uint32_t sector = 0; sector < SECTORS; sector++) {
        if (sector % 2 == 1) {
            REQUIRE(memcmp(bytes + sector * SECTOR, ours_now + sector * SECTOR, SECTOR) == 0);
        } else {
            REQUIRE(memcmp(bytes + sector * SECTOR + 100, theirs_now[sector], PIECE) == 0);
        }
    }
    slots_close();
    mover_free(world.mover);
    tapfs_disk_free(world.disk);
    close(world.files[0]);
    close(plain);
}


/* ---- which way a move takes, and what is noted of it */

static void open_identity(const struct options *options)
{
    tapfs_layer layer = {.virtual_size = SIZE, .identity = 1, .writable = 1};
    uint32_t flags = TAPFS_FILE_WRITABLE | (options->direct ? TAPFS_FILE_DIRECT : 0);

    world.options = *options;
    world.disk = tapfs_disk_new(0);
    REQUIRE(tapfs_disk_add_layer(world.disk, &layer) == 0);
    plain = open_file(&world, "identity", false);
    REQUIRE(ftruncate(plain, SIZE) == 0);
    world.files[0] = open_file(&world, "identity", options->direct);
    REQUIRE(tapfs_disk_add_file(world.disk, 0, world.files[0], flags) == 0);
    world.mover = mover_new(world.disk, DEPTH, 1, options->ring);
    REQUIRE(world.mover != NULL);
    slots_open();
}

static void close_identity(void)
{
    require_idle(world.mover);
    slots_close();
    mover_free(world.mover);
    tapfs_disk_free(world.disk);
    close(world.files[0]);
    close(plain);
}

/* One that the host file's alignment allows, in several parts. */
static void choose_aligned(struct slot *slot, bool writing)
{
    const struct host_file *file = world.disk->layers[0]->files[0];
    uint32_t step = (uint32_t)maximum(512, maximum(file->offset_alignment, file->memory_alignment));
    uint64_t length = (uint64_t)step * (1 + chance(&seed, 7));

    slot->move = (struct move){.offset = (uint64_t)chance(&seed, SIZE / step - 8) * step, .length = length,
                               .writing = writing, .context = slot};
    cut(slot, length, step);
    for (uint32_t i = 0; i < slot->move.part_count; i++) {
        fill(&seed, slot->parts[i].iov_base, slot->parts[i].iov_len);
    }
}

/* Whether io_uring does not write here, so that what is to be written does not succeed. */
static bool by_worker(const struct options *options, bool writing)
{
    return writing && options->direct && options->ring == RING_MORTAL && mover_has_io_uring(world.mover);
}

/* The workers move by pread and pwrite: while these fail, all that succeeds went another way. */
void check_paths(const struct options *options)
{
    static uint8_t model[SIZE];
    struct slot *slot = &slots[0];

    open_identity(options);
    fill(&seed, model, SIZE);
    REQUIRE(pwrite(plain, model, SIZE, 0) == SIZE);
    REQUIRE(fsync(plain) == 0);
    if (mover_has_io_uring(world.mover)) {
        forbid((const int[]){SYS_pread64, SYS_pwrite64}, 2, EIO);
        REQUIRE(pread(plain, model, 1, 0) < 0);
    }
    for (int round = 0; round < 200; round++) {
        bool writing = chance(&seed, 2) == 0;
        choose_aligned(slot, writing);
        if (writing && !by_worker(options, writing)) {
            uint64_t at = slot->move.offset;
            for (uint32_t i = 0; i < slot->move.part_count; i++) {
                memcpy(model + at, slot->parts[i].iov_base, slot->parts[i].iov_len);
                at += slot->parts[i].iov_len;
            }
        } else if (chance(&seed, 4) == 0) {
            fdatasync(plain);
            posix_fadvise(plain, 0, 0, POSIX_FADV_DONTNEED);
        }
        run_alone(world.mover, &slot->move);
        if (by_worker(options, writing)) {
            /* Left to a worker, for whom it fails here. */
            REQUIRE(slot->move.outcome.status == TAPFS_FAILED && slot->move.outcome.error == EIO);
            continue;
        }
        REQUIRE(slot->move.outcome.status == TAPFS_DONE && slot->move.outcome.done == slot->move.length);
        uint64_t at = slot->move.offset;
        for (uint32_t i = 0; i < slot->move.part_count; i++) {
            REQUIRE(memcmp(slot->parts[i].iov_base, model + at, slot->parts[i].iov_len) == 0);
            at += slot->parts[i].iov_len;
        }
    }
    close_identity();
}

/* Under O_DIRECT a write holds whole blocks against who holds a part of one, and no others. */
static void require_block_held(struct slot *slot)
{
    struct host_file *file = world.disk->layers[0]->files[0];
    struct range_holder holder = {
        .object = file, .start = 2 * DIRECT_ALIGNMENT - SECTOR, .end = 2 * DIRECT_ALIGNMENT};

    slot->parts[0] = (struct iovec){.iov_base = slot->memory, .iov_len = SECTOR};
    slot->move = (struct move){.offset = DIRECT_ALIGNMENT, .length = SECTOR, .parts = slot->parts, .part_count = 1,
                               .writing = true, .context = slot};
    struct move beside = slot->move;
    beside.offset = 2 * DIRECT_ALIGNMENT;
    REQUIRE(range_lock_acquire(&world.disk->ranges, &holder, true));
    run_alone(world.mover, &beside);
    REQUIRE(!mover_begin(world.mover, &slot->move));
    mover_submit(world.mover);
    struct pollfd ready = {.fd = mover_fd(world.mover), .events = POLLIN};
    REQUIRE(poll(&ready, 1, 20) == 0);
    range_lock_release(&world.disk->ranges, &holder);
    REQUIRE(wait_ended(world.mover) == &slot->move && slot->move.outcome.status == TAPFS_DONE);
    REQUIRE(world.disk->ranges.first == NULL);
}

/* A write is noted before it is reported, and waits for the length of the file where it makes it longer. */
void check_state(const struct options *options)
{
    struct slot *slot = &slots[0];

    open_identity(options);
    struct host_file *file = world.disk->layers[0]->files[0];
    for (int round = 0; round < 50; round++) {
        atomic_store(&file->dirty, false);
        choose_aligned(slot, true);
        run_alone(world.mover, &slot->move);
        REQUIRE(slot->move.outcome.status == TAPFS_DONE && atomic_load(&file->dirty));
        atomic_store(&file->dirty, false);
        slot->move.writing = false;
        slot->move.outcome.done = 0;
        run_alone(world.mover, &slot->move);
        REQUIRE(slot->move.outcome.status == TAPFS_DONE && !atomic_load(&file->dirty));
    }
    if (options->direct) {
        require_block_held(slot);
    }
    atomic_store(&file->known_size, SIZE - 8192);
    REQUIRE(ftruncate(plain, SIZE - 8192) == 0);
    slot->parts[0] = (struct iovec){.iov_base = slot->memory, .iov_len = 8192};
    slot->move = (struct move){.offset = SIZE - 12288, .length = 8192, .parts = slot->parts, .part_count = 1,
                               .writing = true, .context = slot};
    pthread_rwlock_wrlock(&file->extend_lock);
    REQUIRE(!mover_begin(world.mover, &slot->move));
    mover_submit(world.mover);
    struct pollfd ready = {.fd = mover_fd(world.mover), .events = POLLIN};
    REQUIRE(poll(&ready, 1, 20) == 0 && lseek(plain, 0, SEEK_END) == SIZE - 8192);
    pthread_rwlock_unlock(&file->extend_lock);
    REQUIRE(wait_ended(world.mover) == &slot->move);
    REQUIRE(slot->move.outcome.status == TAPFS_DONE && atomic_load(&file->known_size) == SIZE - 4096);
    close_identity();
}

/* ---- bytes that are lent where the host has them */

static atomic_bool quiesced;

static void *quiesce(void *unused)
{
    (void)unused;
    tapfs_disk_quiesce(world.disk);
    atomic_store(&quiesced, true);
    return NULL;
}

static const uint8_t *lend(struct move *move, uint64_t offset, uint64_t length)
{
    *move = (struct move){.offset = offset, .length = length};
    return mover_lend(world.mover, move);
}

/* A granule may be moved, and its old place be used again, once a quiesce has returned: not while its bytes are lent. */
static void require_held_by_loan(const uint8_t *model)
{
    pthread_t thread;
    struct move move;

    atomic_store(&quiesced, false);
    const uint8_t *bytes = lend(&move, GRANULE, 2 * GRANULE);
    REQUIRE(bytes != NULL && mover_in_flight(world.mover) == 1);
    REQUIRE(pthread_create(&thread, NULL, quiesce, NULL) == 0);
    for (int look = 0; look < 20; look++) {
        usleep(1000);
        REQUIRE(memcmp(bytes, model + GRANULE, 2 * GRANULE) == 0);
        REQUIRE(!atomic_load(&quiesced));
    }
    REQUIRE(mover_passed(world.mover, &move, 2 * GRANULE));
    REQUIRE(pthread_join(thread, NULL) == 0);
    REQUIRE(move.outcome.done == 2 * GRANULE && mover_in_flight(world.mover) == 0);
}

void check_loans(const struct options *options)
{
    static uint8_t model[SIZE];
    tapfs_layer layer = {.virtual_size = SIZE, .granule = GRANULE, .map_unit = UNIT, .writable = 1};
    struct move move;

    world.options = *options;
    pthread_mutex_init(&world.map_lock, NULL);
    fill(&seed, model, SIZE);
    plain = memfd_create("granules", MFD_CLOEXEC);
    REQUIRE(pwrite(plain, model, SIZE, 0) == SIZE);
    for (uint32_t i = 0; i < GRANULES; i++) {
        world.top[i] = (tapfs_extent){.offset = (uint64_t)i * GRANULE, .length = GRANULE, .kind = TAPFS_DATA,
                                      .in_place = 1, .host_offset = (uint64_t)i * GRANULE};
    }
    world.top[5].kind = TAPFS_ZERO;
    world.top[5].in_place = 0;
    world.top[9].host_offset = 40 * GRANULE; /* so three granules from 8 on lie in two places */
    world.disk = tapfs_disk_new(1 << 20);
    REQUIRE(tapfs_disk_add_layer(world.disk, &layer) == 0);
    REQUIRE(tapfs_disk_add_file(world.disk, 0, plain, TAPFS_FILE_WRITABLE) == 0);
    world.mover = mover_new(world.disk, DEPTH, 1, options->ring);
    REQUIRE(world.mover != NULL);

    REQUIRE(lend(&move, 0, GRANULE) == NULL && mover_in_flight(world.mover) == 0); /* no map */
    supply_map(&world, 0, 0);
    require_held_by_loan(model);
    const uint8_t *bytes = lend(&move, GRANULE + 100, 1000);
    REQUIRE(bytes != NULL && memcmp(bytes, model + GRANULE + 100, 1000) == 0);
    REQUIRE(!mover_passed(world.mover, &move, -EFAULT)); /* and then it is done otherwise */
    REQUIRE(lend(&move, 5 * GRANULE, GRANULE) == NULL);
    REQUIRE(lend(&move, 8 * GRANULE, 3 * GRANULE) == NULL);
    bytes = lend(&move, 9 * GRANULE, GRANULE);
    REQUIRE(bytes != NULL && memcmp(bytes, model + 40 * GRANULE, GRANULE) == 0);
    REQUIRE(mover_passed(world.mover, &move, GRANULE));
    /* A hole is not looked at: it would take memory. */
    REQUIRE(fallocate(plain, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2 * GRANULE, GRANULE) == 0);
    REQUIRE(lend(&move, GRANULE, 2 * GRANULE) == NULL && lend(&move, 2 * GRANULE, 100) == NULL);
    REQUIRE(lend(&move, 3 * GRANULE, GRANULE) != NULL && mover_passed(world.mover, &move, GRANULE));
    /* All flights may be lent, and no more. */
    struct move moves[DEPTH];
    for (uint32_t i = 0; i < DEPTH; i++) {
        REQUIRE(lend(&moves[i], GRANULE, 100) != NULL);
    }
    REQUIRE(lend(&move, GRANULE, 100) == NULL);
    for (uint32_t i = 0; i < DEPTH; i++) {
        REQUIRE(mover_passed(world.mover, &moves[i], 100));
    }
    require_idle(world.mover);
    mover_free(world.mover);
    tapfs_disk_free(world.disk);
    close(plain);
    pthread_mutex_destroy(&world.map_lock);
}
