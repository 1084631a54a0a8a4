/* What the two halves of the stand-in share. The order of the counters is that of COUNTERS in stand_in.py. */
enum counter { LAUNCHES, PRODUCTS, COLLECTIVES, GRAPHS, TO_DEVICE, TO_HOST, WITHIN, FILLS, WAITS, ALLOCATIONS, N_COUNTERS };
#define N_NOTED 4096
#define LARGEST_COPY (1ul << 22) /* bytes; larger copies are left out */
extern long stand_in_counters[N_COUNTERS];
void stand_in_count(int counter);
void *stand_in_handle(void); /* a new value for an object that nobody looks into */
