"""Tables and plots of the studies rq1.py to rq4.py."""
