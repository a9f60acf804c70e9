"""mlxpref"""
