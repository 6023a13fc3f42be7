/* The interface of fuzzed programs: the functions that libFuzzer or replay.c calls, and the end of a program that is wrong. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HOLD(condition) ((condition) ? (void)0 : broken(#condition, __FILE__, __LINE__))

static inline _Noreturn void broken(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s, line %d: %s does not hold\n", file, line, what);
    abort();
}

/* Bytes that are taken from the front; there are zeros behind the last one. */
struct input {
    const uint8_t *at;
    size_t left;
};

static inline void take_bytes(struct input *input, void *to, size_t count)
{
    size_t taken = count < input->left ? count : input->left;
    if (taken > 0) {
        memcpy(to, input->at, taken);
        input->at += taken;
        input->left -= taken;
    }
    memset((uint8_t *)to + taken, 0, count - taken);
}

static inline uint8_t take_byte(struct input *input)
{
    uint8_t byte;
    take_bytes(input, &byte, 1);
    return byte;
}

static inline uint64_t take_number(struct input *input)
{
    uint64_t number;
    take_bytes(input, &number, sizeof number);
    return number;
}

/* Once, before the first input. 0. */
int LLVMFuzzerInitialize(int *count, char ***words);
/* An input, of any bytes. 0. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
