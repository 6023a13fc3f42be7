/* Moves with memory of their own, for all scenarios of the mover's driver. */
#ifndef MOVER_DRIVER_H
#define MOVER_DRIVER_H

#include "mover_world.h"

#define PARTS 12
#define MOVE_MAX (96u << 10)
/* A few more than the mover has places for. */
#define SLOT_COUNT (DEPTH + 8)
#define SLOT_BYTES (4 * (size_t)MOVE_MAX)

struct slot {
    struct move move;
    struct iovec parts[PARTS];
    uint8_t *memory;
    bool busy;
};

extern struct world world;
extern struct slot slots[SLOT_COUNT];
extern unsigned seed;

void slots_open(void);
void slots_close(void);
/* A random read or write whose parts hold random bytes. */
void choose(struct slot *slot, bool writing);
/* Cut `length` bytes of the slot's memory into parts at the multiples of `step`. */
void cut(struct slot *slot, uint64_t length, uint32_t step);

void check_model(const struct options *options);
void check_outcomes(const struct options *options);
void check_errors(const struct options *options);
void check_quiesce(const struct options *options);
void check_blocks(const struct options *options);
void check_paths(const struct options *options);
void check_state(const struct options *options);
void check_loans(const struct options *options);

/* From now on system calls of these numbers fail with the error. */
void forbid(const int *calls, size_t count, int error);

#endif
