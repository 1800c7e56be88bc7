"""How rq3.py and rq4.py let a trained model learn more."""
