// A management library as small as can be: two GPUs, the second cut into two instances with a gap between them. Declared from
// NVML's documents and not from the code under test. NVML_FAKE=init says that it does not start.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9, LOST = 15 };

typedef struct device {
    const char *name, *uuid;
    unsigned long long total, used;
} device;

static device devices[] = {
    {"Whole", "GPU-00112233-4455-6677-8899-aabbccddeeff", 80ull << 30, 3ull << 30},
    {"Cut", "GPU-11112233-4455-6677-8899-aabbccddeeff", 80ull << 30, 5ull << 30},
    {"Cut MIG 1g.10gb", "MIG-0123abcd-0000-1111-2222-333344445555", 10ull << 30, 1ull << 20},
    {"Cut MIG 2g.20gb", "MIG-0123abcd-9999-1111-2222-333344445555", 20ull << 30, 2ull << 20},
};

int nvmlInit_v2(void) { return getenv("NVML_FAKE") ? NOT_LOADED : OK; }
int nvmlShutdown(void) { return OK; }

static int text(char *to, unsigned length, const char *from) {
    if (strlen(from) + 1 > length) return TOO_SMALL;
    strcpy(to, from);
    return OK;
}

int nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(to, length, "570.124.06"); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = 2;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned at, device **found) {
    if (at > 1) return NOT_FOUND;
    *found = &devices[at];
    return OK;
}

int nvmlDeviceGetName(device *of, char *to, unsigned length) { return text(to, length, of->name); }
int nvmlDeviceGetUUID(device *of, char *to, unsigned length) { return text(to, length, of->uuid); }

struct memory {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo_v2(device *of, struct memory *memory) {
    memory->total = of->total;
    memory->reserved = 1 << 20;
    memory->used = of->used;
    memory->free = of->total - of->used - memory->reserved;
    return OK;
}

int nvmlDeviceGetMigMode(device *of, unsigned *now, unsigned *pending) {
    if (of == &devices[0]) return NOT_SUPPORTED;
    *now = 1;
    *pending = 0;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(device *of, unsigned *count) {
    *count = 7;
    return of == &devices[1] ? OK : NOT_SUPPORTED;
}

int nvmlDeviceGetMigDeviceHandleByIndex(device *of, unsigned at, device **found) {
    if (of != &devices[1] || (at != 0 && at != 2)) return NOT_FOUND;
    *found = &devices[at == 0 ? 2 : 3];
    return OK;
}

struct process {
    unsigned number;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

int nvmlDeviceGetComputeRunningProcesses_v3(device *of, unsigned *count, struct process *found) {
    if (of == &devices[1]) return LOST;
    unsigned room = *count;
    *count = of == &devices[0] ? 2 : 0;
    if (room < *count) return TOO_SMALL;
    if (*count == 0) return OK;
    found[0] = (struct process){4711, 1ull << 30, ~0u, ~0u};
    found[1] = (struct process){4712, ~0ull, ~0u, ~0u};
    return OK;
}
