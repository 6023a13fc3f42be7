/*
 * The mover against a model, beside the engine's own functions, and beside who moves the map under it.
 * usage: mover_driver SCENARIO FOLDER OPTIONS SEED; "ok" and 0, or a message and 1.
 * OPTIONS: letters: r io_uring, m the same but for direct writes, d O_DIRECT, c a cipher; f: every other submission fails, n: there is no io_uring.
 */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "mover_driver.h"

struct world world;
struct slot slots[SLOT_COUNT];
unsigned seed;

void slots_open(void)
{
    uint8_t *memory;

    REQUIRE(posix_memalign((void **)&memory, 4096, SLOT_COUNT * SLOT_BYTES) == 0);
    for (size_t i = 0; i < SLOT_COUNT; i++) {
        slots[i] = (struct slot){.memory = memory + i * SLOT_BYTES};
    }
    /* It begins and ends within a slot: some moves lie inside of it, some outside, some in both. */
    mover_offer_memory(world.mover, memory + SLOT_BYTES / 2, SLOT_COUNT / 2 * SLOT_BYTES);
}

void slots_close(void)
{
    free(slots[0].memory);
}

void cut(struct slot *slot, uint64_t length, uint32_t step)
{
    uint64_t start = chance(&seed, 8) * step, left = length;
    struct move *move = &slot->move;

    move->part_count = 0;
    move->parts = slot->parts;
    while (left > 0) {
        uint64_t count = left;
        if (move->part_count < PARTS - 1 && left > step && chance(&seed, 4) != 0) {
            count = step * (1 + chance(&seed, (uint32_t)minimum(left / step, 9)));
        }
        count = minimum(count, left);
        slot->parts[move->part_count++] = (struct iovec){.iov_base = slot->memory + start, .iov_len = count};
        /* Pages of a guest: each part may lie elsewhere. */
        start += count + chance(&seed, 2) * step;
        left -= count;
    }
}

void choose(struct slot *slot, bool writing)
{
    static const uint32_t steps[] = {1, 512, 512, 512, 4096};
    uint32_t step = steps[chance(&seed, 5)];
    uint64_t most = chance(&seed, 6) == 0 ? MOVE_MAX : 6 * GRANULE;
    uint64_t offset = chance(&seed, SIZE / step) * (uint64_t)step;
    uint64_t length = minimum((1 + chance(&seed, (uint32_t)most / step)) * (uint64_t)step, SIZE - offset);

    slot->move = (struct move){.offset = offset, .length = length, .writing = writing, .context = slot,
                               .among_others = chance(&seed, 3) == 0};
    cut(slot, length, step);
    for (uint32_t i = 0; i < slot->move.part_count; i++) {
        fill(&seed, slot->parts[i].iov_base, slot->parts[i].iov_len);
    }
}

/* ---- a kernel that refuses */

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define ANSWER(value) BPF_STMT(BPF_RET | BPF_K, (value))

static void install_filter(struct sock_filter *rules, size_t count)
{
    struct sock_fprog program = {.len = (unsigned short)count, .filter = rules};
    REQUIRE(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    REQUIRE(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0);
}

void forbid(const int *calls, size_t count, int error)
{
    for (size_t i = 0; i < count; i++) {
        struct sock_filter rules[] = {
            LOAD(nr),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[i], 0, 1),
            ANSWER(SECCOMP_RET_ERRNO | (uint32_t)error),
            ANSWER(SECCOMP_RET_ALLOW),
        };
        install_filter(rules, sizeof rules / sizeof rules[0]);
    }
}

/* As if the kernel had no memory for a submission of an odd number of entries. */
static void fail_submissions(void)
{
    struct sock_filter rules[] = {
        LOAD(nr),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_enter, 0, 3),
        LOAD(args[1]),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 1, 0, 1),
        ANSWER(SECCOMP_RET_ERRNO | EAGAIN),
        ANSWER(SECCOMP_RET_ALLOW),
    };
    install_filter(rules, sizeof rules / sizeof rules[0]);
}

int main(int count, char **arguments)
{
    REQUIRE(count == 5);
    const char *letters = arguments[3];
    struct options options = {
        .folder = arguments[2],
        .ring = strchr(letters, 'r') != NULL ? RING_ALL : strchr(letters, 'm') != NULL ? RING_MORTAL : RING_NONE,
        .direct = strchr(letters, 'd') != NULL,
        .cipher = strchr(letters, 'c') != NULL,
        .seed = (unsigned)atoi(arguments[4]),
    };
    const struct {
        const char *name;
        void (*check)(const struct options *options);
    } scenarios[] = {
        {"model", check_model},     {"outcomes", check_outcomes}, {"errors", check_errors},
        {"quiesce", check_quiesce}, {"blocks", check_blocks},     {"paths", check_paths},
        {"state", check_state},     {"loans", check_loans},
    };

    seed = options.seed;
    if (strchr(letters, 'n') != NULL) {
        forbid((const int[]){SYS_io_uring_setup}, 1, ENOSYS);
    }
    if (strchr(letters, 'f') != NULL) {
        fail_submissions();
    }
    for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++) {
        if (strcmp(arguments[1], scenarios[i].name) == 0) {
            scenarios[i].check(&options);
            puts("ok");
            return 0;
        }
    }
    die("a scenario", __FILE__, __LINE__);
}
