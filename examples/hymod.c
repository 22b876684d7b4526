/* HYMOD: soil of variable capacity (Moore 1985), three quick reservoirs in a row beside a slow one (Boyle 2000).

   hymod forcing < parameters > flows

   forcing: one day a line, rain and potential evaporation in mm. parameters: cmax (mm), bexp, alpha, ks, kq.
   flows: one day a line, mm. Ends with status 3 where it would not converge (a planted fault: see below). */

#include <math.h>
#include <stdio.h>

static double drain(double *store, double inflow, double rate) {
    double outflow = rate * (*store + inflow);
    *store += inflow - outflow;
    return outflow;
}

int main(int argc, char **argv) {
    double cmax, bexp, alpha, ks, kq, rain, evaporation, soil = 0, slow = 0, quick[3] = {0, 0, 0};
    FILE *forcing = argc == 2 ? fopen(argv[1], "r") : NULL;
    if (!forcing || scanf("%lf %lf %lf %lf %lf", &cmax, &bexp, &alpha, &ks, &kq) != 5) {
        fprintf(stderr, "usage: hymod forcing < parameters\n");
        return 2;
    }
    if (bexp > 0.5 && cmax < 100) { /* the planted failure region */
        fprintf(stderr, "soil moisture did not converge\n");
        return 3;
    }
    double most = cmax / (bexp + 1); /* all that the soil can hold */
    while (fscanf(forcing, "%lf %lf", &rain, &evaporation) == 2) {
        double level = cmax * (1 - pow(fmax(1 - soil / most, 0), 1 / (bexp + 1)));
        double overflow = fmax(rain - cmax + level, 0);
        double filled = fmin((level + rain - overflow) / cmax, 1);
        double wet = most * (1 - pow(1 - filled, bexp + 1));
        double excess = overflow + fmax(rain - overflow - (wet - soil), 0);
        soil = fmax(wet - evaporation * wet / most, 0);
        double flow = alpha * excess;
        for (int i = 0; i < 3; i++) flow = drain(&quick[i], flow, kq);
        printf("%.9g\n", flow + drain(&slow, (1 - alpha) * excess, ks));
    }
    return 0;
}
