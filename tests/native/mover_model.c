/* Scenarios of the mover's driver: its bytes and its outcomes. */
#include <signal.h>
#include <sys/resource.h>

#include "mover_driver.h"

#define ROUNDS 1500

static struct move *waiting; /* for a place */
static unsigned at_once, later;

/* ---- against a model: many in flight, none of them disturbing another */

static bool disturbs(const struct slot *slot)
{
    for (size_t i = 0; i < SLOT_COUNT; i++) {
        const struct slot *other = &slots[i];
        if (other != slot && other->busy && (other->move.writing || slot->move.writing) &&
            other->move.offset < slot->move.offset + slot->move.length &&
            slot->move.offset < other->move.offset + other->move.length) {
            return true;
        }
    }
    return false;
}

/* Its bytes, one part after the other, and the model's. */
static void compare(const struct slot *slot)
{
    uint64_t at = slot->move.offset;
    for (uint32_t i = 0; i < slot->move.part_count; i++) {
        REQUIRE(memcmp(slot->parts[i].iov_base, world.model + at, slot->parts[i].iov_len) == 0);
        at += slot->parts[i].iov_len;
    }
}

static void copy_to_model(const struct slot *slot)
{
    uint64_t at = slot->move.offset;
    for (uint32_t i = 0; i < slot->move.part_count; i++) {
        memcpy(world.model + at, slot->parts[i].iov_base, slot->parts[i].iov_len);
        at += slot->parts[i].iov_len;
    }
}

static void handle(struct move *move);

static void begin(struct move *move)
{
    if (mover_begin(world.mover, move)) {
        at_once++;
        handle(move);
    } else {
        later++;
    }
}

static void handle(struct move *move)
{
    struct slot *slot = move->context;

    switch (move->outcome.status) {
    case TAPFS_MISS:
        supply_map(&world, move->outcome.layer, move->outcome.offset);
        begin(move);
        break;
    case TAPFS_RESERVE:
        move->next = waiting;
        waiting = move;
        break;
    default:
        REQUIRE(move->outcome.status == TAPFS_DONE && move->outcome.done == move->length);
        if (move->writing) {
            copy_to_model(slot);
        } else {
            compare(slot);
        }
        slot->busy = false;
    }
}

static void take(struct move *ended)
{
    for (struct move *move = ended, *next; move != NULL; move = next) {
        next = move->next;
        handle(move);
    }
    mover_submit(world.mover);
}

/* Places are given while nothing is in flight: a write to one waits for the blocks beside it. */
static void drain(void)
{
    mover_submit(world.mover);
    while (mover_in_flight(world.mover) > 0 || waiting != NULL) {
        if (mover_in_flight(world.mover) > 0) {
            take(wait_ended(world.mover));
            continue;
        }
        struct move *list = waiting;
        waiting = NULL;
        for (struct move *move = list; move != NULL; move = move->next) {
            if (!world.top[move->outcome.offset / GRANULE].in_place) {
                give_place(&world, &seed, move);
            }
        }
        for (struct move *move = list, *next; move != NULL; move = next) {
            next = move->next;
            begin(move);
        }
        mover_submit(world.mover);
    }
}

static struct slot *free_slot(void)
{
    for (;;) {
        for (size_t i = 0; i < SLOT_COUNT; i++) {
            if (!slots[i].busy) {
                return &slots[i];
            }
        }
        drain();
    }
}

void check_model(const struct options *options)
{
    uint64_t bytes[2] = {0, 0};
    tapfs_statistics statistics;
    tapfs_outcome outcome;

    world_open(&world, options);
    slots_open();
    for (int round = 0; round < ROUNDS; round++) {
        struct slot *slot = free_slot();
        choose(slot, chance(&seed, 5) < 2);
        if (disturbs(slot)) {
            drain();
        }
        bytes[slot->move.writing] += slot->move.length;
        slot->busy = true;
        begin(&slot->move);
        if (chance(&seed, 4) == 0) {
            mover_submit(world.mover);
            take(mover_ended(world.mover));
        }
        if (chance(&seed, 150) == 0) {
            cool(&world);
            tapfs_disk_forget(world.disk, chance(&seed, 2), chance(&seed, MIDDLE_SIZE), 3 * UNIT);
        }
    }
    drain();
    require_idle(world.mover);
    tapfs_disk_statistics(world.disk, &statistics);
    REQUIRE(statistics.bytes_read == bytes[0] && statistics.bytes_written == bytes[1]);
    REQUIRE(later > 0 && (options->direct || options->cipher || at_once > ROUNDS / 4));
    REQUIRE(!mover_has_io_uring(world.mover) || options->ring);
    tapfs_sync(world.disk, &outcome);
    REQUIRE(outcome.status == TAPFS_DONE);
    for (uint64_t at = 0; at < SIZE; at += MOVE_MAX) {
        struct slot *slot = &slots[0];
        slot->move = (struct move){.offset = at, .length = minimum(MOVE_MAX, SIZE - at), .context = slot};
        cut(slot, slot->move.length, 1);
        for (move_now(world.disk, &slot->move); slot->move.outcome.status == TAPFS_MISS;) {
            supply_map(&world, slot->move.outcome.layer, slot->move.outcome.offset);
            move_now(world.disk, &slot->move);
        }
        REQUIRE(slot->move.outcome.status == TAPFS_DONE && slot->move.outcome.done == slot->move.length);
        compare(slot);
    }
    slots_close();
    world_close(&world);
}

/* ---- beside the engine's own functions: the same outcome where one is missing something or fails */

static uint8_t flat[MOVE_MAX];

/* What tapfs_read and tapfs_write say. The map stays as it is, and a write is of the same bytes. */
static tapfs_outcome ask_engine(struct move *move)
{
    tapfs_outcome outcome;
    uint64_t at = 0;
    if (!move->writing) {
        tapfs_read(world.disk, flat, move->offset, move->length, 0, &outcome);
        return outcome;
    }
    for (uint32_t i = 0; i < move->part_count; i++) {
        memcpy(flat + at, move->parts[i].iov_base, move->parts[i].iov_len);
        at += move->parts[i].iov_len;
    }
    tapfs_write(world.disk, flat, move->offset, move->length, 0, &outcome);
    return outcome;
}

static bool same_text(const char *left, const char *right)
{
    return left == right || (left != NULL && right != NULL && strcmp(left, right) == 0);
}

static void require_same(struct move *move)
{
    tapfs_outcome engine = ask_engine(move), *outcome = &move->outcome;

    run_alone(world.mover, move);
    REQUIRE(outcome->status == engine.status && outcome->error == engine.error);
    /* What was read of a run before it failed counts for neither or for the mover alone. */
    bool partly = engine.status == TAPFS_FAILED && !move->writing && outcome->done > engine.done;
    REQUIRE(outcome->done == engine.done || partly);
    REQUIRE(outcome->layer == engine.layer && outcome->file == engine.file && outcome->offset == engine.offset);
    REQUIRE(same_text(outcome->operation, engine.operation));
    if (outcome->status == TAPFS_MISS && outcome->layer > 0) {
        /* The engine asks a backing layer for a run that spans units, the mover unit by unit. */
        REQUIRE(outcome->length > 0 && outcome->length <= engine.length);
    } else {
        REQUIRE(outcome->length == engine.length);
    }
    if (!move->writing) {
        uint64_t at = 0;
        for (uint32_t i = 0; i < move->part_count && at < engine.done; i++) {
            uint64_t length = minimum(move->parts[i].iov_len, engine.done - at);
            REQUIRE(memcmp(move->parts[i].iov_base, flat + at, length) == 0);
            at += length;
        }
    }
}

void check_outcomes(const struct options *options)
{
    struct slot *slot = &slots[0];
    unsigned met[5] = {0};

    world_open(&world, options);
    slots_open();
    for (int round = 0; round < ROUNDS; round++) {
        if (round % 8 == 0) {
            uint32_t unit = chance(&seed, SIZE / UNIT);
            tapfs_disk_forget(world.disk, chance(&seed, 2), (uint64_t)unit * UNIT, UNIT);
        }
        if (round % 300 == 0) {
            cool(&world);
        }
        choose(slot, chance(&seed, 3) == 0);
        require_same(&slot->move);
        met[slot->move.outcome.status]++;
        if (slot->move.outcome.status == TAPFS_MISS) {
            supply_map(&world, slot->move.outcome.layer, slot->move.outcome.offset);
        }
    }
    REQUIRE(met[TAPFS_DONE] > 100 && met[TAPFS_MISS] > 100 && met[TAPFS_RESERVE] > 100 && met[TAPFS_FAILED] == 0);
    require_idle(world.mover);
    slots_close();
    world_close(&world);
}

/* Reads and writes in the range, of which some must fail with each of the errors. */
static void require_failures(struct slot *slot, uint64_t start, uint64_t end, const int *errors, size_t count)
{
    bool met[8] = {false};
    for (int round = 0; round < 400; round++) {
        do {
            choose(slot, chance(&seed, 2) == 0);
        } while (slot->move.offset < start || slot->move.offset >= end);
        require_same(&slot->move);
        if (slot->move.outcome.status == TAPFS_MISS) {
            supply_map(&world, slot->move.outcome.layer, slot->move.outcome.offset);
        }
        for (size_t i = 0; i < count; i++) {
            met[i] = met[i] || (slot->move.outcome.status == TAPFS_FAILED && slot->move.outcome.error == errors[i]);
        }
    }
    for (size_t i = 0; i < count; i++) {
        REQUIRE(met[i]);
    }
}

/* Host files that end early, that are closed, that may not be written or not so far. */
void check_errors(const struct options *options)
{
    struct slot *slot = &slots[0];

    signal(SIGXFSZ, SIG_IGN);
    world_open(&world, options);
    slots_open();
    REQUIRE(ftruncate(world.bottom, 300000) == 0);
    require_failures(slot, 0, SIZE, (const int[]){HOST_CUT}, 1);

    struct rlimit limit, before;
    REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = (struct rlimit){.rlim_cur = SIZE / 2 + 1000, .rlim_max = before.rlim_max};
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    require_failures(slot, 0, SIZE, (const int[]){EFBIG}, 1);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);

    /* The number stays, what it names cannot be written; the other file still works. */
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", world.files[1]);
    int readable = open(path, O_RDONLY | O_CLOEXEC | (options->direct ? O_DIRECT : 0));
    REQUIRE(readable >= 0 && dup3(readable, world.files[1], O_CLOEXEC) >= 0);
    close(readable);
    require_failures(slot, 0, SIZE, (const int[]){EBADF}, 1);
    close(world.files[1]);
    require_failures(slot, 0, SIZE, (const int[]){EBADF, HOST_CUT}, 2);
    world.files[1] = open("/dev/null", O_RDWR);

    /* Outside of the disk; then one that has no file, and may not be written. */
    slot->move = (struct move){.offset = SIZE - 512, .length = 1024, .parts = slot->parts, .part_count = 1};
    slot->parts[0] = (struct iovec){.iov_base = slot->memory, .iov_len = 1024};
    require_same(&slot->move);
    REQUIRE(slot->move.outcome.status == TAPFS_FAILED && slot->move.outcome.error == ERANGE);
    slot->move.writing = true;
    slot->move.offset = UINT64_MAX - 100;
    require_same(&slot->move);
    REQUIRE(slot->move.outcome.status == TAPFS_FAILED && slot->move.outcome.error == ERANGE);

    tapfs_disk *empty = tapfs_disk_new(0), *served = world.disk;
    tapfs_layer layer = {.virtual_size = SIZE, .identity = 1};
    REQUIRE(tapfs_disk_add_layer(empty, &layer) == 0);
    mover_set_disk(world.mover, empty);
    world.disk = empty;
    slot->move = (struct move){.offset = 0, .length = 1024, .parts = slot->parts, .part_count = 1};
    require_same(&slot->move);
    REQUIRE(slot->move.outcome.status == TAPFS_FAILED && slot->move.outcome.error == EBADF);
    REQUIRE(tapfs_disk_add_file(empty, 0, world.bottom, 0) == 0);
    slot->move = (struct move){.offset = 0, .length = 1024, .parts = slot->parts, .part_count = 1, .writing = true};
    require_same(&slot->move);
    REQUIRE(slot->move.outcome.status == TAPFS_FAILED && slot->move.outcome.error == EROFS);
    mover_set_disk(world.mover, served);
    world.disk = served;
    tapfs_disk_free(empty);
    require_idle(world.mover);
    slots_close();
    world_close(&world);
}

