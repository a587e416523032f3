"""Judges a trained model. Only the baselines train anything.

    __main__        python -m evaluation: run the protocols, judge, write the report
    protocol        what a protocol is: Subject, Section, Picture, Protocol
    protocols/      the table of protocols, and one file for each: run, measure, draw, word
    criteria        the table of criteria, the plan's and ours, and the judge; headlines, summary
    report, page    results.json, CSV, report.md, W&B; report.html. replay: its moving gestures

What the protocols share:

    estimates       numbers with intervals, and tables of them
    scores          noised gestures, paired scores, the Bayes answer, latencies
    samples         generated gestures against the exact prior and against real ones
    events          contacts as a touch screen reports them; classifier, KS distance
    controls        trivial answers, and interpolation, the limit of keyframes
    recorded        gestures of an unknown distribution: what is judged, and the first screen
    family          the family of gestures that the prior describes; validity
    bayes           the Bayes oracle: posterior mean, MMSE, exact-score DDIM
    touch_down      the exact posterior given the touch-down
    few_steps       what few steps do with the exact score, measured once and kept
    figures         what figures are made of

The baselines: baselines (python -m evaluation.baselines), rivals (the networks and their training),
theory (who must win), baselines_record (what is kept).
"""
