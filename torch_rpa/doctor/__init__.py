"""What a first run on a machine shows: ``python -m torch_rpa.doctor``.

The rooms, from below: ``checks`` is what one check says. ``installation`` is what is
installed and set, which ``versions`` and ``settings`` judge. ``batches`` has the small
calls whose ``numbers`` are compared, and ``in_place`` sees whether a cache is copied.
``steps`` has what ``speed`` times, beside ``predictions.json``. ``report`` writes all
of it down, without paths or names of the machine.
"""
