/* AES-128-CBC by guest sector: the IV is the little-endian number of the 512-byte sector. */
#include <endian.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define IDLE_MAX 8

/* Idle contexts with the key schedule done, by direction. */
struct cipher {
    pthread_mutex_t mutex;
    EVP_CIPHER *algorithm;
    EVP_CIPHER_CTX *idle[2][IDLE_MAX];
    size_t idle_count[2];
    uint8_t key[16];
};

struct cipher *cipher_new(const uint8_t key[16])
{
    struct cipher *cipher = calloc(1, sizeof *cipher);
    if (cipher == NULL) {
        return NULL;
    }
    cipher->algorithm = EVP_CIPHER_fetch(NULL, "AES-128-CBC", NULL);
    if (cipher->algorithm == NULL) {
        free(cipher);
        return NULL;
    }
    memcpy(cipher->key, key, sizeof cipher->key);
    pthread_mutex_init(&cipher->mutex, NULL);
    return cipher;
}

void cipher_free(struct cipher *cipher)
{
    if (cipher == NULL) {
        return;
    }
    for (size_t direction = 0; direction < 2; direction++) {
        while (cipher->idle_count[direction] > 0) {
            EVP_CIPHER_CTX_free(cipher->idle[direction][--cipher->idle_count[direction]]);
        }
    }
    EVP_CIPHER_free(cipher->algorithm);
    pthread_mutex_destroy(&cipher->mutex);
    OPENSSL_cleanse(cipher->key, sizeof cipher->key);
    free(cipher);
}

static EVP_CIPHER_CTX *take(struct cipher *cipher, bool encrypt)
{
    EVP_CIPHER_CTX *context = NULL;

    pthread_mutex_lock(&cipher->mutex);
    if (cipher->idle_count[encrypt] > 0) {
        context = cipher->idle[encrypt][--cipher->idle_count[encrypt]];
    }
    pthread_mutex_unlock(&cipher->mutex);
    if (context != NULL) {
        return context;
    }
    context = EVP_CIPHER_CTX_new();
    if (context != NULL && (EVP_CipherInit_ex2(context, cipher->algorithm, cipher->key, NULL, encrypt, NULL) != 1 ||
                            EVP_CIPHER_CTX_set_padding(context, 0) != 1)) {
        EVP_CIPHER_CTX_free(context);
        context = NULL;
    }
    return context;
}

static void give_back(struct cipher *cipher, bool encrypt, EVP_CIPHER_CTX *context)
{
    pthread_mutex_lock(&cipher->mutex);
    if (cipher->idle_count[encrypt] < IDLE_MAX) {
        cipher->idle[encrypt][cipher->idle_count[encrypt]++] = context;
        context = NULL;
    }
    pthread_mutex_unlock(&cipher->mutex);
    EVP_CIPHER_CTX_free(context);
}

int cipher_apply(struct cipher *cipher, bool encrypt, uint8_t *buffer, uint64_t guest_offset, uint64_t length)
{
    EVP_CIPHER_CTX *context = take(cipher, encrypt);
    if (context == NULL) {
        return ENOMEM;
    }
    for (uint64_t done = 0; done < length; done += SECTOR_BYTES) {
        uint64_t vector[2] = {htole64((guest_offset + done) / SECTOR_BYTES), 0};
        int count = 0;
        if (EVP_CipherInit_ex2(context, NULL, NULL, (const unsigned char *)vector, encrypt, NULL) != 1 ||
            EVP_CipherUpdate(context, buffer + done, &count, buffer + done, SECTOR_BYTES) != 1 ||
            count != SECTOR_BYTES) {
            EVP_CIPHER_CTX_free(context);
            return EIO;
        }
    }
    give_back(cipher, encrypt, context);
    return 0;
}
