"""The paper's question at one's own scale: `gcrl study`.

Does the hybrid classify as well as the same network trained by contrast alone, and know the data as
well as one trained to generate alone? Four runs from the same start, on the same images in the same
order, beside the untrained network and one trained with labels.

variants.py says what differs between the runs, runs.py trains and measures them one by one,
verdict.py decides, compute.py counts what a run costs, report.py writes the table and the figure.
"""
